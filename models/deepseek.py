"""DeepSeek-V2 and V3 (DeepSeek-AI 2024): latent attention, and many small experts picked group by group.

Covers V2, V2-Lite, V2.5, Coder-V2 (`DeepseekV2ForCausalLM`), V3 and R1 (`DeepseekV3ForCausalLM`). V3's layer for
predicting a second token is not read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxllm.models.layers.mla import LatentAttention
from jaxllm.models.layers.moe import MoE
from jaxllm.models.layers.param import normal
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.mixtral import EXPERT_NAMES, MoEConfig, SparseDecoderLayer, expert_options


@dataclass(frozen=True)
class DeepseekConfig(MoEConfig):
    latent_size: int = 1  # kv_lora_rank
    query_latent_size: int | None = None  # q_lora_rank
    key_size: int = 1  # qk_nope_head_dim
    rope_size: int = 2  # qk_rope_head_dim
    value_size: int = 1  # v_head_dim
    attention_scale: float = 1.0
    num_groups: int = 1  # of experts
    groups_picked: int = 1  # a token's experts are in so many groups
    routed_scale: float = 1.0

    names = MappingProxyType({"num_experts": "n_routed_experts"})
    scoring: ClassVar[str]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekConfig":
        get = cls.reader(config)
        get.choice("scoring_func", (cls.scoring,), default=cls.scoring)
        get.choice("moe_layer_freq", (1,), default=1)
        rope_size, key_size = get.integer("qk_rope_head_dim"), get.integer("qk_nope_head_dim")
        read = super().from_hf({**config, "head_dim": rope_size})
        expert_size = get.integer("moe_intermediate_size")
        return replace(
            read,
            rope=replace(read.rope, interleaved=get.boolean("rope_interleave", default=True)),
            latent_size=get.integer("kv_lora_rank"),
            query_latent_size=get.optional_integer("q_lora_rank"),
            key_size=key_size,
            rope_size=rope_size,
            value_size=get.integer("v_head_dim"),
            attention_scale=(key_size + rope_size) ** -0.5 * _score_factor(config, read.rope),
            expert_size=expert_size,
            shared_expert_size=expert_size * get.integer("n_shared_experts", default=0, minimum=0),
            dense_layers=frozenset(range(get.integer("first_k_dense_replace", default=0, minimum=0))),
            norm_topk_prob=get.boolean("norm_topk_prob", default=False),
            routed_scale=get.number("routed_scaling_factor", default=1.0),
            **cls.routing(config),
            **cls.groups(config),
        )

    @classmethod
    def groups(cls, config: Mapping[str, Any]) -> dict[str, int]:
        """num_groups and groups_picked, checked."""
        get = cls.reader(config)
        experts, top_k = get.integer("num_experts"), get.integer("num_experts_per_tok")
        groups, picked = get.integer("n_group", default=1), get.integer("topk_group", default=1)
        if experts % groups:
            raise ValueError(f"n_group={groups} must divide n_routed_experts={experts}")
        if picked > groups or top_k > picked * (experts // groups):
            raise ValueError(
                f"topk_group={picked} must be at most n_group={groups}, and its groups of {experts // groups} experts "
                f"hold num_experts_per_tok={top_k}"
            )
        return {"num_groups": groups, "groups_picked": picked}


def _score_factor(config: Mapping[str, Any], rope) -> float:
    """YaRN's temperature as a factor on the scores, as far as it is not one on cos and sin (see config.py)."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    mscale = settings.get("mscale_all_dim")
    if rope.rope_type != "yarn" or not mscale or rope.factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(rope.factor) + 1.0) ** 2


class DeepseekV2Config(DeepseekConfig):
    scoring = "softmax"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekV2Config":
        get = cls.reader(config)
        # With true, the published code and transformers' differ; no checkpoint is known to have it.
        get.choice("norm_topk_prob", (False,), default=False)
        method = get.choice("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
        groups = {} if method == "group_limited_greedy" else {"n_group": 1, "topk_group": 1}
        return super().from_hf({**config, **groups})


class DeepseekV3Config(DeepseekConfig):
    scoring = "sigmoid"
    defaults = MappingProxyType(
        {
            "first_k_dense_replace": 3,
            "n_group": 8,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
        }
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekV3Config":
        cls.reader(config).choice("topk_method", ("noaux_tc",), default="noaux_tc")
        return super().from_hf(config)


class DeepseekMoE(MoE):
    def __init__(self, config: DeepseekConfig, dtype):
        super().__init__(**expert_options(config, dtype), correction=config.scoring == "sigmoid")
        self.num_groups, self.groups_picked = config.num_groups, config.groups_picked
        self.routed_scale = config.routed_scale

    def route(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 [T, E] -> the weights float32 [T, k] and the numbers i32[T, k] of each token's experts.

        V2: the groups with the best expert, and in them the best experts. V3: the groups whose two best add up to most;
        a bias a expert, trained to keep the load even, has a say in the choice and none in the weights.
        """
        if self.gate.e_score_correction_bias is None:
            scores = jax.nn.softmax(logits, axis=-1)
            weights, experts = jax.lax.top_k(self._in_picked_groups(scores, best=1, other=0.0), self.top_k)
        else:
            scores = jax.nn.sigmoid(logits)
            choice = scores + self.gate.e_score_correction_bias[...][None, :]
            _, experts = jax.lax.top_k(self._in_picked_groups(choice, best=2, other=-jnp.inf), self.top_k)
            weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return weights * self.routed_scale, experts

    def _in_picked_groups(self, scores: jax.Array, *, best: int, other: float) -> jax.Array:
        """scores [T, E], and `other` outside of the groups whose `best` scores add up to most."""
        if self.num_groups == 1:
            return scores
        grouped = scores.reshape(len(scores), self.num_groups, -1)
        of_groups = jnp.sum(jax.lax.top_k(grouped, min(best, grouped.shape[-1]))[0], axis=-1)
        _, picked = jax.lax.top_k(of_groups, self.groups_picked)
        is_picked = jnp.any(jax.nn.one_hot(picked, self.num_groups, dtype=bool), axis=1)
        return jnp.where(is_picked[:, :, None], grouped, other).reshape(scores.shape)


class DeepseekLayer(SparseDecoderLayer):
    def make_attention(self, config: DeepseekConfig, dtype, layer: int) -> LatentAttention:
        return LatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            latent_size=config.latent_size,
            query_latent_size=config.query_latent_size,
            key_size=config.key_size,
            rope_size=config.rope_size,
            value_size=config.value_size,
            scale=config.attention_scale,
            bias=config.attention_bias,
            interleaved_rope=config.rope.interleaved,
            dtype=dtype,
            initializer=normal(config.initializer_range),
        )

    def make_experts(self, config: DeepseekConfig, dtype) -> DeepseekMoE:
        return DeepseekMoE(config, dtype)


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "DeepSeek-V2, V2-Lite and V2.5; DeepSeek-Coder-V2"
    config_class: ClassVar = DeepseekV2Config
    layer_class: ClassVar = DeepseekLayer
    weight_names: ClassVar = (
        *(row for row in LlamaForCausalLM.weight_names if ".self_attn." not in row[0]),
        ("model.layers.{}.self_attn.q_proj", "layers.{}.attention.q"),
        ("model.layers.{}.self_attn.q_a_proj", "layers.{}.attention.q_a"),
        ("model.layers.{}.self_attn.q_a_layernorm", "layers.{}.attention.q_a_norm"),
        ("model.layers.{}.self_attn.q_b_proj", "layers.{}.attention.q_b"),
        ("model.layers.{}.self_attn.kv_a_proj_with_mqa", "layers.{}.attention.kv_a"),
        ("model.layers.{}.self_attn.kv_a_layernorm", "layers.{}.attention.kv_a_norm"),
        ("model.layers.{}.self_attn.kv_b_proj", "layers.{}.attention.kv_b"),
        ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.out"),
        *EXPERT_NAMES,
        ("model.layers.{}.mlp.shared_experts.gate_proj", "layers.{}.mlp.shared.gate_up", "gate"),
        ("model.layers.{}.mlp.shared_experts.up_proj", "layers.{}.mlp.shared.gate_up", "up"),
        ("model.layers.{}.mlp.shared_experts.down_proj", "layers.{}.mlp.shared.down"),
    )

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], None], ...]:
        shape = (num_pages, page_size, self.config.latent_size + self.config.rope_size)
        return ((shape, None),) * self.config.num_hidden_layers


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "DeepSeek-V3 and V3.1; DeepSeek-R1"
    config_class: ClassVar = DeepseekV3Config

    def __init__(self, config: DeepseekConfig, dtype):
        super().__init__(config, dtype)
        # Layers past the last predict further tokens from its output.
        self.ignored_weights = (*self.ignored_weights, f"model.layers.{config.num_hidden_layers}.*")
