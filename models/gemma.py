"""Gemma 2 and 3 (Gemma team 2024, 2025): a norm on both sides of every layer, local and global attention, soft caps.

The text part of `Gemma3ForConditionalGeneration` is the same network under longer names; its vision tower is not read.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.config import ModelConfig, RopeConfig, windows_of
from jaxllm.models.interface import KVPages, LayerKV, StepBatch
from jaxllm.models.layers.attention import Attention
from jaxllm.models.layers.embed import Embed
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.mlp import GatedMLP
from jaxllm.models.layers.norm import OffsetRMSNorm
from jaxllm.models.layers.param import normal
from jaxllm.models.layers.rope import Rope, sequence_lengths
from jaxllm.models.llama import QK_NORM_NAMES, LlamaForCausalLM


@dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """What Gemma 2 and 3 have besides; `rope` is that of layers without a window."""

    query_scale: float = 1.0  # of the scores
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    local_rope: RopeConfig | None = None  # of layers with a window

    names = MappingProxyType({"hidden_act": "hidden_activation"})

    @property
    def max_model_len(self) -> int:
        return self.max_position_embeddings  # Gemma 3's rope factor is in it

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        get = cls.reader(config)
        get.choice("use_bidirectional_attention", (False,), default=False)
        return replace(
            super().from_hf(config),
            windows=cls.windows_of(config),
            query_scale=get.number("query_pre_attn_scalar", minimum=1e-6) ** -0.5,
            attention_soft_cap=_soft_cap(get, "attn_logit_softcapping", config),
            logit_soft_cap=_soft_cap(get, "final_logit_softcapping", config),
        )

    @classmethod
    def windows_of(cls, config: Mapping[str, Any]) -> tuple[int | None, ...]:
        """Every layer has a window but each `sliding_window_pattern`-th."""
        get = cls.reader(config)
        pattern, window = get.integer("sliding_window_pattern"), get.integer("sliding_window")
        slides = lambda layer: (layer + 1) % pattern != 0  # noqa: E731
        return windows_of(config, get.integer("num_hidden_layers"), window, slides)


def _soft_cap(get, key: str, config: Mapping[str, Any]) -> float | None:
    if key in config and config[key] is None:  # which is not the family's default, as an absent key is
        return None
    cap = get.number(key, default=0.0)
    return cap or None


class Gemma2Config(GemmaConfig):
    defaults = MappingProxyType(
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        }
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma2Config":
        read = super().from_hf(config)
        return replace(read, local_rope=read.rope)


class Gemma3Config(GemmaConfig):
    defaults = MappingProxyType(
        {
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "vocab_size": 262208,
        }
    )
    qk_norm = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma3Config":
        """transformers 5 has both ropes in `rope_parameters`, by layer type; before, `rope_scaling` was the global
        layers', and the local ones had `rope_local_base_freq` alone."""
        ropes = config.get("rope_parameters") or {}
        if "full_attention" in ropes:
            both = (
                {**config, "rope_theta": theta, "rope_parameters": ropes.get(kind)}
                for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
            )
        else:
            theta = cls.reader(config).number("rope_local_base_freq", default=1e4)
            both = (config, {**config, "rope_theta": theta, "rope_scaling": None, "rope_parameters": None})
        read, local = (super(Gemma3Config, cls).from_hf(one) for one in both)
        return replace(read, local_rope=local.rope)


class Gemma3TextOfConfig(Gemma3Config):
    """`Gemma3ForConditionalGeneration`: the text's settings are in `text_config`, the dtype is outside."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma3TextOfConfig":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"text_config={text!r} must be an object with the text model's settings")
        outside = {key: config[key] for key in ("architectures", "dtype", "torch_dtype") if key in config}
        return super().from_hf({**text, **outside})


class DecoderLayer(nnx.Module):
    def __init__(self, config: GemmaConfig, dtype, layer: int):
        self.is_local = config.window(layer) is not None
        norm = functools.partial(OffsetRMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        options = dict(dtype=dtype, initializer=normal(config.initializer_range))
        self.attention_norm = norm(config.hidden_size)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            scale=config.query_scale,
            window=config.window(layer),
            soft_cap=config.attention_soft_cap,
            norm=functools.partial(norm, axis=None) if config.qk_norm else None,
            **options,
        )
        self.attention_out_norm = norm(config.hidden_size)
        self.mlp_norm = norm(config.hidden_size)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act, bias=False, **options)
        self.mlp_out_norm = norm(config.hidden_size)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, kv: LayerKV, batch: StepBatch
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, D] -> ([T, D], kv with this step's tokens)."""
        attended, kv = self.attention(self.attention_norm(x), cos, sin, kv, batch)
        x = x + self.attention_out_norm(attended)
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), kv


class Gemma2ForCausalLM(nnx.Module):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "Gemma 2"
    config_class: ClassVar = Gemma2Config
    weight_names: ClassVar = (
        *(
            row
            for row in LlamaForCausalLM.weight_names
            if row[0] != "model.layers.{}.post_attention_layernorm"  # which here norms what attention gives
        ),
        ("model.layers.{}.post_attention_layernorm", "layers.{}.attention_out_norm"),
        ("model.layers.{}.pre_feedforward_layernorm", "layers.{}.mlp_norm"),
        ("model.layers.{}.post_feedforward_layernorm", "layers.{}.mlp_out_norm"),
    )
    ignored_weights: ClassVar = ()
    optional_prefixes: ClassVar = LlamaForCausalLM.optional_prefixes

    def __init__(self, config: GemmaConfig, dtype):
        self.config = config
        initializer = normal(config.initializer_range)
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype=dtype, initializer=initializer)
        # Rounded to the weights' dtype, as transformers does: of 3072 it is 55.5 in bfloat16, and trained so.
        self.embed_scale = float(np.sqrt(config.hidden_size).astype(jnp.dtype(dtype)))
        self.layers = nnx.List([DecoderLayer(config, dtype, layer) for layer in range(config.num_hidden_layers)])
        self.norm = OffsetRMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.rope, self.local_rope = Rope(config.rope), Rope(config.local_rope)
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
        x = x * jnp.asarray(self.embed_scale, x.dtype)
        lengths = sequence_lengths(batch.positions, batch.prompt_lens, batch.seq_ids)
        rotations = {False: self.rope(batch.positions, lengths), True: self.local_rope(batch.positions, lengths)}
        new_kv = []
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_kv = layer(x, *rotations[layer.is_local], layer_kv, batch)
            new_kv.append(layer_kv)
        return self.norm(x), tuple(new_kv)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [S, D] -> float32 [S, V]."""
        logits = self.embed.logits(hidden) if self.lm_head is None else self.lm_head(hidden, out_dtype=jnp.float32)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    kv_shapes = LlamaForCausalLM.kv_shapes


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3's text models: five local layers to a global one, each kind with a rope of its own; norms of q and k."""

    known_as: ClassVar = "Gemma 3, 270M and 1B"
    config_class: ClassVar = Gemma3Config
    weight_names: ClassVar = (*Gemma2ForCausalLM.weight_names, *QK_NORM_NAMES)


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of Gemma 3's models of text and images."""

    known_as: ClassVar = "Gemma 3, 4B to 27B, text alone"
    config_class: ClassVar = Gemma3TextOfConfig
    weight_names: ClassVar = tuple(
        (f"language_model.{theirs}", *ours) for theirs, *ours in Gemma3ForCausalLM.weight_names
    )
    ignored_weights: ClassVar = ("vision_tower.*", "multi_modal_projector.*")
    optional_prefixes: ClassVar = ()
