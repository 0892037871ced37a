"""Llama (Touvron et al. 2023) and what is built like it: RMSNorm, rotary attention, a gated feed-forward layer.

What Mistral, Qwen2, Qwen3 and Phi-3 do differently is data: in their configs (windows, biases, norms of queries and
keys) and in their tables of weight names.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import ModelConfig, windows_of
from jaxllm.models.interface import KVPages, LayerKV, StepBatch
from jaxllm.models.layers.attention import Attention
from jaxllm.models.layers.embed import Embed
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.mlp import GatedMLP
from jaxllm.models.layers.norm import RMSNorm
from jaxllm.models.layers.param import normal
from jaxllm.models.layers.rope import Rope, sequence_lengths


class DecoderLayer(nnx.Module):
    attention_class: ClassVar = Attention

    def __init__(self, config: ModelConfig, dtype, layer: int):
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = self.make_attention(config, dtype, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = self.make_mlp(config, dtype, layer)

    def make_attention(self, config: ModelConfig, dtype, layer: int) -> nnx.Module:
        return self.attention_class(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            dtype=dtype,
            initializer=normal(config.initializer_range),
            interleaved_rope=config.rope is not None and config.rope.interleaved,
            alibi=config.alibi,
            window=config.window(layer),
            norm=functools.partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype, axis=None)
            if config.qk_norm
            else None,
        )

    def make_mlp(self, config: ModelConfig, dtype, layer: int) -> nnx.Module:
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            initializer=normal(config.initializer_range),
        )

    def __call__(
        self, x: jax.Array, cos: jax.Array | None, sin: jax.Array | None, kv: LayerKV, batch: StepBatch
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, D] -> ([T, D], kv with this step's tokens)."""
        attended, kv = self.attention(self.attention_norm(x), cos, sin, kv, batch)
        x = x + attended
        return x + self.feed_forward(self.mlp_norm(x), batch), kv

    def feed_forward(self, x: jax.Array, batch: StepBatch) -> jax.Array:
        """x [T, D] -> [T, D]; for families to which it matters what is padding."""
        return self.mlp(x)


QK_NORM_NAMES = (
    ("model.layers.{}.self_attn.q_norm", "layers.{}.attention.q_norm"),
    ("model.layers.{}.self_attn.k_norm", "layers.{}.attention.k_norm"),
)


class LlamaForCausalLM(nnx.Module):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "Llama 1, 2 and 3.x; Vicuna; Chinese-Alpaca-2; Yi; DeepSeek LLM; SmolLM2"
    layer_class: ClassVar = DecoderLayer
    # Old checkpoints hold the rotary frequencies, which follow from the config.
    ignored_weights: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    optional_prefixes: ClassVar = ("model.",)  # as a decoder is saved by itself, for embeddings
    weight_names: ClassVar = (
        ("model.embed_tokens", "embed"),
        ("model.layers.{}.input_layernorm", "layers.{}.attention_norm"),
        ("model.layers.{}.self_attn.q_proj", "layers.{}.attention.qkv", "q"),
        ("model.layers.{}.self_attn.k_proj", "layers.{}.attention.qkv", "k"),
        ("model.layers.{}.self_attn.v_proj", "layers.{}.attention.qkv", "v"),
        ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.out"),
        ("model.layers.{}.post_attention_layernorm", "layers.{}.mlp_norm"),
        ("model.layers.{}.mlp.gate_proj", "layers.{}.mlp.gate_up", "gate"),
        ("model.layers.{}.mlp.up_proj", "layers.{}.mlp.gate_up", "up"),
        ("model.layers.{}.mlp.down_proj", "layers.{}.mlp.down"),
        ("model.norm", "norm"),
        ("lm_head", "lm_head"),
    )

    def __init__(self, config: ModelConfig, dtype):
        self.config = config
        initializer = normal(config.initializer_range)
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype=dtype, initializer=initializer)
        self.layers = nnx.List([self.layer_class(config, dtype, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.rope = None if config.rope is None else Rope(config.rope)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype, initializer=initializer
            )
        )

    def __call__(self, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """Hidden states [T, D] after the last norm, and the pages with this step's KV."""
        x = self.embed(batch.token_ids)
        cos, sin = self.rotations(batch)
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = layer(x, cos, sin, layer_kv, batch)
            new_kv.append(layer_kv)
        return self.norm(x), tuple(new_kv)

    def rotations(self, batch: StepBatch) -> tuple[jax.Array | None, jax.Array | None]:
        """(cos, sin) of each token, [T, rotary_dim / 2]; (None, None) for a model that does not rotate."""
        if self.rope is None:
            return None, None
        return self.rope(batch.positions, sequence_lengths(batch.positions, batch.prompt_lens, batch.seq_ids))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] -> float32 [S, V]."""
        if self.lm_head is None:
            return self.embed.logits(hidden)
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        shape = (num_pages, self.config.num_key_value_heads, page_size, self.config.head_dim)
        return ((shape, shape),) * self.config.num_hidden_layers


class MistralConfig(ModelConfig):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MistralConfig":
        read = super().from_hf(config)
        # null is no window; a config without the key means the first Mistral's.
        window = cls.reader(config).optional_integer("sliding_window") if "sliding_window" in config else 4096
        return replace(read, windows=(window,) * read.num_hidden_layers)


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral (Jiang et al. 2023): Llama with a sliding window in its first version."""

    known_as: ClassVar = "Mistral 7B; Mistral Nemo; Mistral Small"
    config_class: ClassVar = MistralConfig


class Qwen2Config(ModelConfig):
    defaults = MappingProxyType(
        {
            "attention_bias": True,
            "attention_out_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        }
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2Config":
        read, get = super().from_hf(config), cls.reader(config)
        first = get.integer("max_window_layers", minimum=0)
        window = get.integer("sliding_window") if get.boolean("use_sliding_window", default=False) else None
        slides = functools.partial(cls.slides, first=first)
        return replace(read, windows=windows_of(config, read.num_hidden_layers, window, slides))

    @classmethod
    def slides(cls, layer: int, first: int) -> bool:
        """Whether a layer has a window, where max_window_layers is `first` and the config does not list them."""
        return layer >= first


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen1.5, Qwen2 and Qwen2.5 (Qwen team 2024): biases on q, k and v; the later layers may have a window."""

    known_as: ClassVar = "Qwen1.5; Qwen2; Qwen2.5; QwQ; DeepSeek-R1-Distill-Qwen"
    config_class: ClassVar = Qwen2Config


class Qwen3Config(Qwen2Config):
    defaults = MappingProxyType(
        {**Qwen2Config.defaults, "attention_bias": False, "attention_out_bias": None, "head_dim": 128}
    )
    qk_norm = True


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 (Qwen team 2025): each head's queries and keys are normed."""

    known_as: ClassVar = "Qwen3"
    config_class: ClassVar = Qwen3Config
    weight_names: ClassVar = (*LlamaForCausalLM.weight_names, *QK_NORM_NAMES)


class Phi3Config(ModelConfig):
    defaults = MappingProxyType({"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Phi3Config":
        read = super().from_hf(config)
        window = cls.reader(config).optional_integer("sliding_window")
        return replace(read, windows=(window,) * read.num_hidden_layers)


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024): fused projections, a window, LongRoPE."""

    known_as: ClassVar = "Phi-3; Phi-3.5-mini; Phi-4; Phi-4-mini"
    config_class: ClassVar = Phi3Config
    weight_names: ClassVar = (
        ("model.embed_tokens", "embed"),
        ("model.layers.{}.input_layernorm", "layers.{}.attention_norm"),
        ("model.layers.{}.self_attn.qkv_proj", "layers.{}.attention.qkv"),
        ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.out"),
        ("model.layers.{}.post_attention_layernorm", "layers.{}.mlp_norm"),
        ("model.layers.{}.mlp.gate_up_proj", "layers.{}.mlp.gate_up"),
        ("model.layers.{}.mlp.down_proj", "layers.{}.mlp.down"),
        ("model.norm", "norm"),
        ("lm_head", "lm_head"),
    )
