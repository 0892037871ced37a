"""Mixture of experts (Shazeer et al. 2017): each token goes through the few feed-forward layers that a router picks.

Tokens are sorted by expert and multiplied group by group, so that the work is that of the experts picked and no token
is ever dropped: what a token gets does not depend on its batch mates. Padding goes to no expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.interface import StepBatch
from jaxllm.models.layers.linear import Linear, StackedLinear, matmul
from jaxllm.models.layers.mlp import ACTIVATIONS, GatedMLP
from jaxllm.models.layers.param import Initializer, param, zeros


class Router(nnx.Module):
    """Scores of a token for each expert, always in float32."""

    def __init__(self, hidden_size: int, num_experts: int, *, correction: bool, dtype, initializer: Initializer):
        self.weight = param((num_experts, hidden_size), dtype, (None, "embed"), initializer)
        # DeepSeek-V3's, under its name there: see models/deepseek.py.
        self.e_score_correction_bias = param((num_experts,), jnp.float32, (None,), zeros) if correction else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> float32 [T, E]."""
        return matmul(x.astype(jnp.float32), self.weight[...].astype(jnp.float32))


class Experts(nnx.Module):
    """E gated feed-forward layers."""

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, *, act: str, dtype, initializer):
        self.act = act
        options = dict(dtype=dtype, initializer=initializer)
        parts = {"gate": expert_size, "up": expert_size}
        self.gate_up = StackedLinear(num_experts, hidden_size, parts, axes=("gate_up", "embed"), **options)
        self.down = StackedLinear(num_experts, expert_size, hidden_size, axes=("embed", "mlp"), **options)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x [M, D], sorted by expert -> [M, D]. Rows past the groups' hold anything."""
        gate, up = jnp.split(self.gate_up(x, group_sizes), 2, axis=-1)
        return self.down(ACTIVATIONS[self.act](gate) * up, group_sizes)


class MoE(nnx.Module):
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        expert_size: int,
        *,
        top_k: int,
        normalize: bool,
        act: str,
        dtype,
        initializer: Initializer,
        shared_size: int = 0,
        shared_gate: bool = False,
        correction: bool = False,
    ):
        """`normalize`: the weights of a token's experts add up to 1. `shared_size`: the width of an expert that every
        token goes through, if any, with a gate of its own where `shared_gate` is true (Qwen2-MoE). `correction`: the
        router has a bias for choosing."""
        self.top_k, self.normalize = top_k, normalize
        options = dict(dtype=dtype, initializer=initializer)
        self.gate = Router(hidden_size, num_experts, correction=correction, **options)
        self.experts = Experts(num_experts, hidden_size, expert_size, act=act, **options)
        self.shared = GatedMLP(hidden_size, shared_size, act=act, bias=False, **options) if shared_size else None
        self.shared_gate = Linear(hidden_size, 1, axes=(None, "embed"), **options) if shared_gate else None

    def __call__(self, x: jax.Array, batch: StepBatch) -> jax.Array:
        """x [T, D] -> [T, D]. Zeros, besides the shared expert's part, for padding."""
        weights, experts = self.route(self.gate(x))
        out = self._through_experts(x, weights, experts, batch)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)

    def route(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 [T, E] -> the weights float32 [T, k] and the numbers i32[T, k] of each token's experts."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.top_k)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def _through_experts(self, x: jax.Array, weights: jax.Array, experts: jax.Array, batch: StepBatch) -> jax.Array:
        num_tokens, num_experts = x.shape[0], self.gate.weight.shape[0]
        in_use = jnp.arange(num_tokens, dtype=jnp.int32) < batch.query_starts[-1]
        # Padding is sorted behind the last expert's tokens, and belongs to no group.
        picked = jnp.where(in_use[:, None], experts, num_experts).reshape(-1)  # [T * k]
        order = jnp.argsort(picked, stable=True)
        group_sizes = jnp.zeros(num_experts, jnp.int32).at[picked].add(1, mode="drop")
        given = self.experts(x[order // self.top_k], group_sizes)
        # Back in the tokens' order rather than added where they belong: the sum's order is always the same.
        given = given[jnp.argsort(order)].reshape(num_tokens, self.top_k, -1).astype(jnp.float32)
        out = jnp.sum(given * weights[:, :, None], axis=1).astype(x.dtype)
        return jnp.where(in_use[:, None], out, 0)
