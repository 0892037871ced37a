"""OPT (Zhang et al. 2022): learned positions, LayerNorm with biases, a feed-forward layer without a gate.

OPT-350m is built another way than the other sizes: norms come after each residual sum, there is none at the end, and
the embedding is narrower than the layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models import gpt2
from jaxllm.models.config import ModelConfig
from jaxllm.models.interface import KVPages, LayerKV, StepBatch
from jaxllm.models.layers.embed import Embed
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.norm import LayerNorm
from jaxllm.models.layers.param import normal

POSITION_OFFSET = 2  # the first rows of the position table are padding's, as in fairseq
_DEFAULTS = {"activation_function": "relu", "init_std": 0.02, "tie_word_embeddings": True, "enable_bias": True}


@dataclass(frozen=True)
class OPTConfig(ModelConfig):
    names = MappingProxyType(
        {"intermediate_size": "ffn_dim", "hidden_act": "activation_function", "initializer_range": "init_std"}
    )

    norm_first: bool = True
    final_norm: bool = True
    embedding_size: int = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "OPTConfig":
        config = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
        get = cls.reader(config)
        get.choice("layer_norm_elementwise_affine", (True,), default=True)
        bias = get.boolean("enable_bias", default=True)
        biases = dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), bias)
        read = super().from_hf({**config, **biases, "rms_norm_eps": 1e-5})
        norm_first = get.boolean("do_layer_norm_before", default=True)
        return replace(
            read,
            rope=None,
            norm_first=norm_first,
            # Fine-tunes from before transformers 4.20 have none: it was forgotten there.
            final_norm=norm_first and not get.boolean("_remove_final_layer_norm", default=False),
            embedding_size=get.integer("word_embed_proj_dim", default=read.hidden_size),
        )


class DecoderLayer(gpt2.DecoderLayer):
    """GPT-2's, or with `norm_first` false the same with each norm after its sum."""

    def __init__(self, config: OPTConfig, dtype):
        super().__init__(config, dtype)
        self.norm_first = config.norm_first

    def __call__(self, x: jax.Array, kv: LayerKV, batch: StepBatch) -> tuple[jax.Array, LayerKV]:
        """x [T, D] -> ([T, D], kv with this step's tokens)."""
        if self.norm_first:
            return super().__call__(x, kv, batch)
        attended, kv = self.attention(x, None, None, kv, batch)
        x = self.attention_norm(x + attended)
        return self.mlp_norm(x + self.mlp(x)), kv


class OPTForCausalLM(nnx.Module):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "OPT"
    config_class: ClassVar = OPTConfig
    ignored_weights: ClassVar = ()
    optional_prefixes: ClassVar = ("model.", "model.decoder.")
    weight_names: ClassVar = (
        ("model.decoder.embed_tokens", "embed"),
        ("model.decoder.embed_positions", "positions"),
        ("model.decoder.project_in", "project_in"),
        ("model.decoder.layers.{}.self_attn_layer_norm", "layers.{}.attention_norm"),
        ("model.decoder.layers.{}.self_attn.q_proj", "layers.{}.attention.qkv", "q"),
        ("model.decoder.layers.{}.self_attn.k_proj", "layers.{}.attention.qkv", "k"),
        ("model.decoder.layers.{}.self_attn.v_proj", "layers.{}.attention.qkv", "v"),
        ("model.decoder.layers.{}.self_attn.out_proj", "layers.{}.attention.out"),
        ("model.decoder.layers.{}.final_layer_norm", "layers.{}.mlp_norm"),
        ("model.decoder.layers.{}.fc1", "layers.{}.mlp.up"),
        ("model.decoder.layers.{}.fc2", "layers.{}.mlp.down"),
        ("model.decoder.final_layer_norm", "norm"),
        ("model.decoder.project_out", "project_out"),
        ("lm_head", "lm_head"),
    )

    def __init__(self, config: OPTConfig, dtype):
        self.config = config
        options = dict(dtype=dtype, initializer=normal(config.initializer_range))
        width, narrow = config.hidden_size, config.embedding_size
        projected = narrow != width
        self.embed = Embed(config.vocab_size, narrow, **options)
        self.positions = Embed(config.max_position_embeddings + POSITION_OFFSET, width, **options)
        self.project_in = Linear(narrow, width, axes=("embed", None), **options) if projected else None
        self.layers = nnx.List([DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(width, eps=config.rms_norm_eps, dtype=dtype) if config.final_norm else None
        self.project_out = Linear(width, narrow, axes=(None, "embed"), **options) if projected else None
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(narrow, config.vocab_size, axes=("vocab", "embed"), **options)
        )

    def __call__(self, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """Hidden states [T, D] after the last norm, and the pages with this step's KV."""
        x = self.embed(batch.token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions(batch.positions + POSITION_OFFSET)
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = layer(x, layer_kv, batch)
            new_kv.append(layer_kv)
        return x if self.norm is None else self.norm(x), tuple(new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] -> float32 [S, V]."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.lm_head is None:
            return self.embed.logits(hidden)
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        shape = (num_pages, self.config.num_key_value_heads, page_size, self.config.head_dim)
        return ((shape, shape),) * self.config.num_hidden_layers
