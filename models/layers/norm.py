"""RMSNorm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.layers.param import ones, param


class RMSNorm(nnx.Module):
    def __init__(self, size: int, *, eps: float, dtype):
        self.eps = eps
        self.weight = param((size,), dtype, ("embed",), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> [T, D]. Normalizes in float32, rounds to x's dtype, only then scales: as transformers does."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * self.weight[...][None, :]
