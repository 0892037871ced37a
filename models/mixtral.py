"""Mixtral, Qwen2-MoE and Qwen3-MoE: Llama with a mixture of experts for feed-forward layers.

Jiang et al. 2024, "Mixtral of Experts"; Qwen team 2024, 2025. What differs is data: names, router, shared expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxllm.models.config import ModelConfig
from jaxllm.models.interface import StepBatch
from jaxllm.models.layers.moe import MoE
from jaxllm.models.layers.param import normal
from jaxllm.models.llama import QK_NORM_NAMES, DecoderLayer, LlamaForCausalLM, Qwen2Config


@dataclass(frozen=True)
class MoEConfig(ModelConfig):
    num_experts: int = 1  # E
    num_experts_per_tok: int = 1
    expert_size: int = 1  # the experts' F
    norm_topk_prob: bool = True
    dense_layers: frozenset[int] = frozenset()  # which have an ordinary feed-forward layer
    shared_expert_size: int = 0

    @classmethod
    def routing(cls, config: Mapping[str, Any]) -> dict[str, int]:
        """num_experts and num_experts_per_tok, checked."""
        get = cls.reader(config)
        experts, picked = get.integer("num_experts"), get.integer("num_experts_per_tok")
        if picked > experts:
            raise ValueError(f"num_experts_per_tok={picked} must be at most the number of experts, {experts}")
        return {"num_experts": experts, "num_experts_per_tok": picked}


class MixtralConfig(MoEConfig):
    names = MappingProxyType({"num_experts": "num_local_experts"})
    defaults = MappingProxyType({"num_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MixtralConfig":
        read = super().from_hf(config)
        window = cls.reader(config).optional_integer("sliding_window")
        return replace(
            read,
            windows=(window,) * read.num_hidden_layers,
            expert_size=read.intermediate_size,
            **cls.routing(config),
        )


@dataclass(frozen=True)
class Qwen2MoeConfig(MoEConfig, Qwen2Config):
    defaults = MappingProxyType(
        {
            **Qwen2Config.defaults,
            "decoder_sparse_step": 1,
            "norm_topk_prob": False,
            "moe_intermediate_size": 1408,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 5632,
        }
    )
    names = MappingProxyType({"attention_bias": "qkv_bias"})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2MoeConfig":
        read, get = super().from_hf(config), cls.reader(config)
        dense, step = config.get("mlp_only_layers") or [], get.integer("decoder_sparse_step")
        layers = range(read.num_hidden_layers)
        if not isinstance(dense, list | tuple) or not set(dense) <= set(layers):
            raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers, from 0 to {len(layers) - 1}")
        return replace(
            read,
            expert_size=get.integer("moe_intermediate_size"),
            norm_topk_prob=get.boolean("norm_topk_prob", default=False),
            dense_layers=frozenset(layer for layer in layers if layer in dense or (layer + 1) % step),
            shared_expert_size=get.integer("shared_expert_intermediate_size", minimum=0),
            **cls.routing(config),
        )

    @classmethod
    def slides(cls, layer: int, first: int) -> bool:
        return layer < first and layer % 2 == 0


class Qwen3MoeConfig(Qwen2MoeConfig):
    names = MappingProxyType({"num_experts": "num_local_experts"})  # transformers 5 writes that one
    defaults = MappingProxyType(
        {
            **Qwen2MoeConfig.defaults,
            "attention_bias": False,
            "attention_out_bias": None,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "shared_expert_intermediate_size": 0,
        }
    )
    qk_norm = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """All layers have the window, if there is one, whatever `layer_types` says."""
        return super().from_hf({key: value for key, value in config.items() if key != "layer_types"})

    @classmethod
    def slides(cls, layer: int, first: int) -> bool:
        return True


def expert_options(config: MoEConfig, dtype) -> dict[str, Any]:
    """The arguments of MoE that all families take from their configs alike."""
    return {
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "expert_size": config.expert_size,
        "top_k": config.num_experts_per_tok,
        "normalize": config.norm_topk_prob,
        "act": config.hidden_act,
        "dtype": dtype,
        "initializer": normal(config.initializer_range),
        "shared_size": config.shared_expert_size,
    }


class SparseDecoderLayer(DecoderLayer):
    """A layer whose feed-forward part is a mixture of experts, unless the config says that it is dense."""

    def make_mlp(self, config: MoEConfig, dtype, layer: int) -> nnx.Module:
        if layer in config.dense_layers:
            return super().make_mlp(config, dtype, layer)
        return self.make_experts(config, dtype)

    def make_experts(self, config: MoEConfig, dtype) -> MoE:
        return MoE(**expert_options(config, dtype), shared_gate=config.shared_expert_size > 0)

    def feed_forward(self, x: jax.Array, batch: StepBatch) -> jax.Array:
        return self.mlp(x, batch) if isinstance(self.mlp, MoE) else self.mlp(x)


class MixtralForCausalLM(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "Mixtral 8x7B and 8x22B"
    config_class: ClassVar = MixtralConfig
    layer_class: ClassVar = SparseDecoderLayer
    weight_names: ClassVar = (
        *LlamaForCausalLM.weight_names,
        ("model.layers.{}.block_sparse_moe.gate", "layers.{}.mlp.gate"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w1", "layers.{}.mlp.experts.gate_up", "gate"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w3", "layers.{}.mlp.experts.gate_up", "up"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w2", "layers.{}.mlp.experts.down"),
    )


EXPERT_NAMES = (
    ("model.layers.{}.mlp.gate", "layers.{}.mlp.gate"),
    ("model.layers.{}.mlp.experts.{}.gate_proj", "layers.{}.mlp.experts.gate_up", "gate"),
    ("model.layers.{}.mlp.experts.{}.up_proj", "layers.{}.mlp.experts.gate_up", "up"),
    ("model.layers.{}.mlp.experts.{}.down_proj", "layers.{}.mlp.experts.down"),
)


class Qwen2MoeForCausalLM(MixtralForCausalLM):
    """Qwen1.5-MoE and Qwen2-57B-A14B: small experts, and a shared one with a gate."""

    known_as: ClassVar = "Qwen1.5-MoE; Qwen2-57B-A14B"
    config_class: ClassVar = Qwen2MoeConfig
    weight_names: ClassVar = (
        *LlamaForCausalLM.weight_names,
        *EXPERT_NAMES,
        ("model.layers.{}.mlp.shared_expert.gate_proj", "layers.{}.mlp.shared.gate_up", "gate"),
        ("model.layers.{}.mlp.shared_expert.up_proj", "layers.{}.mlp.shared.gate_up", "up"),
        ("model.layers.{}.mlp.shared_expert.down_proj", "layers.{}.mlp.shared.down"),
        ("model.layers.{}.mlp.shared_expert_gate", "layers.{}.mlp.shared_gate"),
    )


class Qwen3MoeForCausalLM(MixtralForCausalLM):
    """Qwen3-30B-A3B and Qwen3-235B-A22B: Qwen3 with 128 small experts."""

    known_as: ClassVar = "Qwen3-30B-A3B; Qwen3-235B-A22B; Qwen3-Coder"
    config_class: ClassVar = Qwen3MoeConfig
    weight_names: ClassVar = (*LlamaForCausalLM.weight_names, *EXPERT_NAMES, *QK_NORM_NAMES)
