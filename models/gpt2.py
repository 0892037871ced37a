"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm first, a feed-forward layer without a gate.

Its checkpoints hold the layers' matrices as [in, out], the other way round than everybody else's.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import ModelConfig
from jaxllm.models.interface import KVPages, LayerKV, StepBatch
from jaxllm.models.layers.attention import Attention
from jaxllm.models.layers.embed import Embed
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.mlp import MLP
from jaxllm.models.layers.norm import LayerNorm
from jaxllm.models.layers.param import normal

_DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
# Keys whose other values mean another network, of which no checkpoint is known.
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


class GPT2Config(ModelConfig):
    names = MappingProxyType(
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "max_position_embeddings": "n_positions",
        }
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        config = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
        get = cls.reader(config)
        for key, value in _FIXED.items():
            get.choice(key, (value,), default=value)
        biases = dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), True)
        width = get.integer("intermediate_size", default=4 * get.integer("hidden_size"))
        return replace(super().from_hf({**config, **biases, "n_inner": width}), rope=None)


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, dtype):
        initializer = normal(config.initializer_range)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            dtype=dtype,
            initializer=initializer,
        )
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            initializer=initializer,
        )

    def __call__(self, x: jax.Array, kv: LayerKV, batch: StepBatch) -> tuple[jax.Array, LayerKV]:
        """x [T, D] -> ([T, D], kv with this step's tokens)."""
        attended, kv = self.attention(self.attention_norm(x), None, None, kv, batch)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kv


class GPT2LMHeadModel(nnx.Module):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "GPT-2; DistilGPT2"
    config_class: ClassVar = GPT2Config
    ignored_weights: ClassVar = ("*.attn.bias", "*.attn.masked_bias")  # old checkpoints hold the causal mask
    optional_prefixes: ClassVar = ("transformer.",)
    weight_names: ClassVar = (
        ("transformer.wte", "embed"),
        ("transformer.wpe", "positions"),
        ("transformer.h.{}.ln_1", "layers.{}.attention_norm"),
        ("transformer.h.{}.attn.c_attn", "layers.{}.attention.qkv", None, "transposed"),
        ("transformer.h.{}.attn.c_proj", "layers.{}.attention.out", None, "transposed"),
        ("transformer.h.{}.ln_2", "layers.{}.mlp_norm"),
        ("transformer.h.{}.mlp.c_fc", "layers.{}.mlp.up", None, "transposed"),
        ("transformer.h.{}.mlp.c_proj", "layers.{}.mlp.down", None, "transposed"),
        ("transformer.ln_f", "norm"),
        ("lm_head", "lm_head"),
    )

    def __init__(self, config: GPT2Config, dtype):
        self.config = config
        options = dict(dtype=dtype, initializer=normal(config.initializer_range))
        self.embed = Embed(config.vocab_size, config.hidden_size, **options)
        self.positions = Embed(config.max_position_embeddings, config.hidden_size, **options)
        self.layers = nnx.List([DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, axes=("vocab", "embed"), **options)
        )

    def __call__(self, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """Hidden states [T, D] after the last norm, and the pages with this step's KV."""
        x = self.embed(batch.token_ids) + self.positions(batch.positions)
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = layer(x, layer_kv, batch)
            new_kv.append(layer_kv)
        return self.norm(x), tuple(new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] -> float32 [S, V]."""
        if self.lm_head is None:
            return self.embed.logits(hidden)
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        shape = (num_pages, self.config.num_key_value_heads, page_size, self.config.head_dim)
        return ((shape, shape),) * self.config.num_hidden_layers
