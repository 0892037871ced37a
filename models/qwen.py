"""Qwen, the first version (Bai et al. 2023, "Qwen Technical Report"): Llama whose config and tensors have older names.

Beyond the length trained with, `seq_length`, it stretches the rotation by the length of the prompt (dynamic NTK) and
scales queries by the logarithm of their position (logn attention). Both depend on a token's own request alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.config import ModelConfig, RopeConfig
from jaxllm.models.interface import StepBatch
from jaxllm.models.layers.attention import Attention
from jaxllm.models.layers.rope import inverse_frequencies
from jaxllm.models.llama import DecoderLayer, LlamaForCausalLM


@dataclass(frozen=True)
class QWenRopeConfig(RopeConfig):
    """With `dynamic_ntk`, a prompt of more than 2^(i-1) and at most 2^i times `max_positions` tokens has the base
    theta * (2^(i+1) - 1)^(d / (d - 2)), and so has its answer, however long."""

    dynamic_ntk: bool = False

    def kv_depends_on_prompt_len(self, prompt_len: int) -> bool:
        return self.dynamic_ntk and prompt_len > self.max_positions

    def stretched(self, doublings: int) -> RopeConfig:
        alpha = 2 ** (doublings + 1) - 1
        return replace(self, theta=self.theta * alpha ** (self.rotary_dim / (self.rotary_dim - 2)))


@dataclass(frozen=True)
class QWenConfig(ModelConfig):
    names = MappingProxyType(  # most of them in the first releases only
        {
            "hidden_size": "n_embd",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "head_dim": "kv_channels",
            "rms_norm_eps": "layer_norm_epsilon",
            "max_position_embeddings": "n_positions",
        }
    )

    logn_attention: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "QWenConfig":
        get = cls.reader(config)
        get.choice("scale_attn_weights", (True,), default=True)
        bias = not get.boolean("no_bias", default=True)
        both = get.integer("intermediate_size")  # of the gate and of what it is multiplied with
        if both % 2:
            raise ValueError(f"intermediate_size={both} must be even: it counts both halves of the gated layer")
        read = super().from_hf(
            {
                **{key: value for key, value in config.items() if key != "ffn_hidden_size"},
                "intermediate_size": both // 2,
                "attention_bias": True,
                "attention_out_bias": bias,
                "mlp_bias": bias,
                "rope_theta": get.number("rotary_emb_base", default=10000.0),
                "partial_rotary_factor": get.number("rotary_pct", default=1.0),
                "dtype": _dtype(config),
            }
        )
        if read.num_attention_heads * read.head_dim != read.hidden_size:
            raise ValueError(
                f"kv_channels={read.head_dim} times num_attention_heads={read.num_attention_heads} must be "
                f"hidden_size={read.hidden_size}"
            )
        rope = {field.name: getattr(read.rope, field.name) for field in fields(read.rope)}
        rope["max_positions"] = get.integer("seq_length", default=read.max_position_embeddings)
        dynamic_ntk = get.boolean("use_dynamic_ntk", default=False)
        if dynamic_ntk and read.rope.rotary_dim < 4:
            raise ValueError(f"use_dynamic_ntk=True needs at least 4 rotated dimensions, not {read.rope.rotary_dim}")
        return replace(
            read,
            rope=QWenRopeConfig(**rope, dynamic_ntk=dynamic_ntk),
            logn_attention=get.boolean("use_logn_attn", default=False),
        )


def _dtype(config: Mapping[str, Any]) -> str:
    """The published configs have flags in place of a dtype; when none is set, the model runs in bfloat16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named or ("float32" if config.get("fp32") else "float16" if config.get("fp16") else "bfloat16")


class QWenRope:
    """(cos, sin) [T, rotary_dim / 2] of each token, by its position and its prompt's length."""

    def __init__(self, config: QWenRopeConfig, max_model_len: int):
        doublings = math.ceil(math.log2(max_model_len / config.max_positions)) if config.dynamic_ntk else 0
        self.limits = tuple(config.max_positions << i for i in range(doublings))
        self.inv_freq = np.stack([inverse_frequencies(config.stretched(i)) for i in range(doublings + 1)])

    def __call__(self, positions: jax.Array, prompt_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """positions i32[T]; prompt_lens i32[T], of each token's request."""
        doublings = sum((prompt_lens > limit).astype(jnp.int32) for limit in self.limits) + jnp.zeros_like(prompt_lens)
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(self.inv_freq)[doublings]
        return jnp.cos(angles), jnp.sin(angles)


class QWenAttention(Attention):
    logn_from: int | None = None  # logn attention: positions from this one on scale their query

    def scaled(self, q: jax.Array, batch: StepBatch) -> jax.Array:
        """q [T, N, H] times log(n) / log(trained length) at the n-th token of a sequence, beyond that length."""
        if self.logn_from is None:
            return q
        lengths = jnp.maximum(batch.positions + 1, self.logn_from).astype(jnp.float32)
        scale = jnp.log(lengths) / math.log(self.logn_from)
        return (q.astype(jnp.float32) * scale[:, None, None]).astype(q.dtype)


class QWenLayer(DecoderLayer):
    attention_class: ClassVar = QWenAttention

    def __init__(self, config: QWenConfig, dtype, layer: int):
        super().__init__(config, dtype, layer)
        if config.logn_attention:
            self.attention.logn_from = config.rope.max_positions


class QWenLMHeadModel(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "Qwen (the first version)"
    config_class: ClassVar = QWenConfig
    layer_class: ClassVar = QWenLayer
    weight_names: ClassVar = (
        ("transformer.wte", "embed"),
        ("transformer.h.{}.ln_1", "layers.{}.attention_norm"),
        ("transformer.h.{}.attn.c_attn", "layers.{}.attention.qkv"),
        ("transformer.h.{}.attn.c_proj", "layers.{}.attention.out"),
        ("transformer.h.{}.ln_2", "layers.{}.mlp_norm"),
        ("transformer.h.{}.mlp.w2", "layers.{}.mlp.gate_up", "gate"),
        ("transformer.h.{}.mlp.w1", "layers.{}.mlp.gate_up", "up"),
        ("transformer.h.{}.mlp.c_proj", "layers.{}.mlp.down"),
        ("transformer.ln_f", "norm"),
        ("lm_head", "lm_head"),
    )

    def __init__(self, config: QWenConfig, dtype):
        super().__init__(config, dtype)
        self.rope = QWenRope(config.rope, config.max_model_len)

    def rotations(self, batch: StepBatch) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of each token, [T, rotary_dim / 2]."""
        return self.rope(batch.positions, batch.prompt_lens[batch.seq_ids])
