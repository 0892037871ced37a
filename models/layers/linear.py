"""Linear layers, and the only home of matrix products with weights, be they float ones or quantized.

A weight has the checkpoint's orientation, [out, in], and is contracted on its last axis, so that loading transposes
nothing (but GPT-2's).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.layers.param import Initializer, param, zeros
from jaxllm.models.layers.quantized import declare_packed
from jaxllm.models.quantization.scheme import Layout
from pallas_kernels.grouped_matmul import grouped_matmul


def matmul(x: jax.Array, weight: jax.Array, out_dtype=None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out], in `out_dtype` (x's when None). Accumulates in float32.

    Float32 operands are multiplied as float32: on a GPU the default would round them to TF32 first.
    """
    return jax.lax.dot_general(
        x,
        weight,
        dimension_numbers=(((x.ndim - 1,), (1,)), ((), ())),
        precision=_precision(x),
        preferred_element_type=jnp.dtype(out_dtype or x.dtype),
    )


def _precision(x: jax.Array):
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def per_head(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, N, in], each head times its own matrix of weight [N, in, out] -> [T, N, out]. Precision as in `matmul`."""
    return jnp.einsum("tni,nio->tno", x, weight, precision=_precision(x))


class Linear(nnx.Module):
    """y = x Wᵀ + b. With `out_features` a dict it is several layers merged into one, each a named part of W's rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        axes: tuple[str, str],  # of weight: (out, in)
        dtype,
        initializer: Initializer,
        bias: bool = False,
    ):
        parts = dict(out_features) if isinstance(out_features, Mapping) else {}
        size = sum(parts.values()) if parts else out_features
        self.in_features, self.out_features, self.axes = in_features, size, axes
        self.part_names, self.part_sizes = tuple(parts), tuple(parts.values())
        self.weight = param((size, in_features), dtype, axes, initializer, parts)
        self.bias = param((size,), dtype, axes[:1], zeros, parts) if bias else None

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        packed = not isinstance(self.weight, nnx.Param)
        y = self.weight(x, out_dtype) if packed else matmul(x, self.weight[...], out_dtype)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    def quantize(self, layout: Layout, separate_parts: bool) -> None:
        """Declare the weight as a packed one, or as one for each part. Only before the parameters are looked at."""
        parts = dict(zip(self.part_names, self.part_sizes, strict=True)) if separate_parts else self.out_features
        self.weight = declare_packed(self.in_features, parts, layout, self.axes)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The parts of a merged layer's output [..., out], each [..., size of the part]."""
        y, parts, start = self(x), [], 0
        for size in self.part_sizes:
            parts.append(jax.lax.slice_in_dim(y, start, start + size, axis=-1))
            start += size
        return parts


class StackedLinear(nnx.Module):
    """E linear layers without biases, one an expert. With `out_features` a dict each is several, as in Linear."""

    bias = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        axes: tuple[str, str],  # of an expert's weight: (out, in)
        dtype,
        initializer: Initializer,
    ):
        parts = dict(out_features) if isinstance(out_features, Mapping) else {}
        size = sum(parts.values()) if parts else out_features
        self.num_experts, self.in_features, self.out_features, self.axes = num_experts, in_features, size, axes
        self.part_names, self.part_sizes = tuple(parts), tuple(parts.values())
        shape = (num_experts, size, in_features)
        self.weight = param(shape, dtype, ("expert", *axes), initializer, parts, stacked=True)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x [M, in], sorted by expert, of which each has group_sizes i32[E] rows -> [M, out]."""
        if isinstance(self.weight, nnx.Param):
            return grouped_matmul(x, self.weight[...], group_sizes)
        return self.weight.grouped(x, group_sizes)

    def quantize(self, layout: Layout, separate_parts: bool) -> None:
        """As Linear.quantize."""
        parts = dict(zip(self.part_names, self.part_sizes, strict=True)) if separate_parts else self.out_features
        self.weight = declare_packed(self.in_features, parts, layout, self.axes, self.num_experts)
