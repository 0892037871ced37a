"""Token embedding, and the same table used as an output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.layers.linear import matmul
from jaxllm.models.layers.param import Initializer, param


class Embed(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, initializer: Initializer):
        self.weight = param((vocab_size, hidden_size), dtype, ("vocab", "embed"), initializer)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """token_ids i32[T] -> [T, D]. Ids out of range (padding may hold anything) are clipped."""
        return self.weight[...].at[token_ids].get(mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The tied output head: hidden [S, D] -> float32 [S, V]."""
        return matmul(hidden, self.weight[...], out_dtype=jnp.float32)
