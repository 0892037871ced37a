"""RMSNorm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization") and LayerNorm (Ba et al. 2016)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.layers.param import ones, param, zeros


class RMSNorm(nnx.Module):
    def __init__(self, size: int, *, eps: float, dtype, axis: str | None = "embed"):
        self.eps = eps
        self.weight = param((size,), dtype, (axis,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]. Normalizes in float32, rounds to x's dtype, then scales: as transformers does."""
        return normalized(x, self.eps).astype(x.dtype) * self.weight[...]


class OffsetRMSNorm(nnx.Module):
    """Gemma's: the scale is 1 + weight, and is applied before rounding to x's dtype."""

    def __init__(self, size: int, *, eps: float, dtype, axis: str | None = "embed"):
        self.eps = eps
        self.weight = param((size,), dtype, (axis,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return (normalized(x, self.eps) * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


def normalized(x: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over its root mean square, in float32.

    `eps` and the division are inside the sum: where they follow it, XLA takes two kernels for the norm of a single row.
    """
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.sum((jnp.square(x32) + eps) / x.shape[-1], axis=-1, keepdims=True))


class LayerNorm(nnx.Module):
    def __init__(self, size: int, *, eps: float, dtype):
        self.eps = eps
        self.weight = param((size,), dtype, ("embed",), ones)
        self.bias = param((size,), dtype, ("embed",), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> [T, D]. All in float32, rounded once: as torch does."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        weight, bias = (leaf[...].astype(jnp.float32)[None, :] for leaf in (self.weight, self.bias))
        return (centred * jax.lax.rsqrt(variance + self.eps) * weight + bias).astype(x.dtype)
