"""A network whose answers can be computed by hand, for tests of engines and of other people's models. Public.

Each layer of RunningSumForTesting replaces a value by the sum of all values so far modulo V. With one layer the next
token is the sum of all tokens so far mod V; each further layer takes the running sum of the one before, so from two
layers on the order of the tokens matters too. For V = 10 and the default two layers:

    tokens              3  4  5
    after layer 0       3  7  2      (3, 3+4, 3+4+5 mod 10)
    after layer 1       3  0  2      (3, 3+7, 3+7+2 mod 10): the next token is 2

The sums are real attention over paged KV: all scores are equal, so attention gives the mean of the values, which times
the length (position + 1), rounded, is their sum. A wrong page, slot, length or position gives a wrong token. The
numbers are integers that float32 holds exactly as long as V times the length stays below a million.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import ModelConfig
from jaxllm.models.interface import KVPages, StepBatch
from jaxllm.models.layers.attention import paged_attention
from jaxllm.models.layers.embed import Embed

ARCHITECTURE = "RunningSumForTesting"


def config_dict(vocab_size: int = 32, num_layers: int = 2, **overrides: Any) -> dict[str, Any]:
    """What a config.json of the network would hold; see `ModelConfig.from_hf`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "running_sum_for_testing",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 1,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "dtype": "float32",
        **overrides,
    }


def next_token(tokens: Sequence[int], vocab_size: int = 32, num_layers: int = 2) -> int:
    """The most likely token after `tokens`, in plain Python."""
    values = list(tokens)
    for _ in range(num_layers):
        values = [sum(values[: i + 1]) % vocab_size for i in range(len(values))]
    return values[-1]


def continuation(prompt: Sequence[int], num_tokens: int, vocab_size: int = 32, num_layers: int = 2) -> list[int]:
    """The `num_tokens` tokens that greedy decoding adds to `prompt`."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, vocab_size, num_layers))
    return tokens[len(prompt) :]


class RunningSumForTesting(nnx.Module):
    """A `Model` (see interface.py). Its one weight is the embedding: row t holds t in every place."""

    known_as: ClassVar = "no model: a network for tests"
    weight_names: ClassVar = (("embed_tokens", "embed"),)
    ignored_weights: ClassVar = ()

    def __init__(self, config: ModelConfig, dtype):
        if dtype != jnp.float32:
            raise ValueError(f"dtype={jnp.dtype(dtype).name!r}: {ARCHITECTURE} is exact in float32 alone")
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype=dtype, initializer=_row_numbers)

    def __call__(self, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """Hidden states [T, D], all D equal to the next token, and the pages with this step's KV."""
        heads, kv_heads, dim = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        lengths = (batch.positions + 1).astype(jnp.float32)
        x = self.embed(batch.token_ids)
        new_kv = []
        for layer_kv in kv:
            q = jnp.zeros((x.shape[0], heads, dim), x.dtype)  # every score is 0: uniform attention
            v = jnp.broadcast_to(x[:, :1, None], (x.shape[0], kv_heads, dim))
            mean, layer_kv = paged_attention(q, v, v, layer_kv, batch, scale=1 / math.sqrt(dim))
            total = jnp.round(mean.reshape(x.shape[0], -1) * lengths[:, None])
            x = jnp.mod(total, float(self.config.vocab_size))
            new_kv.append(layer_kv)
        return x, tuple(new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] -> float32 [S, V]: minus the distance of each token from the next one."""
        tokens = jnp.arange(self.config.vocab_size, dtype=jnp.float32)
        return -jnp.abs(hidden[:, :1] - tokens[None, :])

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        shape = (num_pages, self.config.num_key_value_heads, page_size, self.config.head_dim)
        return ((shape, shape),) * self.config.num_hidden_layers


def _row_numbers(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(shape[0], dtype=dtype)[:, None], shape)
