"""The weight of a quantized linear layer, or of experts': packed on the device, and dequantized inside the product.

A packed weight is declared by its arrays, so that they are parameters like any other: `weight.codes`, `weight.scales`
and, where it has them, `weight.zeros` and `weight.permutation`.
"""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.layers.param import Initializer, param
from jaxllm.models.quantization.scheme import Canonical, Layout
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quant_matmul import QuantizedWeight, abstract, pack, quant_matmul

# The standard deviation of random codes around their zero: what a random weight's scale is divided by.
_SPREAD = {"int4": 4.6, "int8": 74.0, "fp8": 0.6}
_RANDOM_STDDEV = 0.02


class QuantizedMatrix(nnx.Module):
    """A packed weight [out, in]; with `num_experts`, so many of them, stacked: [E, out, in]."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        layout: Layout,
        axes: tuple[str, str],
        num_experts: int | None = None,
    ):
        self.out_features, self.in_features, self.layout = out_features, in_features, layout
        arrays = abstract_weight(out_features, in_features, layout)
        out, in_ = axes
        declare = functools.partial(_declare, num_experts=num_experts)
        self.codes = declare(arrays.codes, (out, in_, None, None), _random_codes(layout.format))
        self.scales = declare(arrays.scales, (out, in_, None), _constant(_RANDOM_STDDEV / _SPREAD[layout.format]))
        self.zeros = declare(arrays.zeros, (out, in_, None), _constant(8.0 if layout.format == "int4" else 0.0))
        self.permutation = declare(arrays.permutation, (None,), _in_order)

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(
            self.codes[...],
            self.scales[...],
            None if self.zeros is None else self.zeros[...],
            None if self.permutation is None else self.permutation[...],
            format=self.layout.format,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.layout.group_size,
        )

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """x [..., in] -> [..., out], in `out_dtype` (x's when None)."""
        return quant_matmul(x, self.weight, out_dtype=out_dtype)

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Of stacked weights: x [M, in], sorted by expert, of which each has group_sizes i32[E] rows -> [M, out]."""
        return grouped_matmul(x, self.weight, group_sizes)


class QuantizedParts(nnx.Module):
    """Several packed weights over one input, where each has its columns in an order of its own."""

    def __init__(self, parts: Mapping[str, QuantizedMatrix]):
        self.names = tuple(parts)
        for name, matrix in parts.items():
            setattr(self, name, matrix)

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """x [..., in] -> [..., out], the parts' outputs side by side."""
        return jnp.concatenate([getattr(self, name)(x, out_dtype) for name in self.names], axis=-1)

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """As QuantizedMatrix.grouped, the parts' outputs side by side."""
        return jnp.concatenate([getattr(self, name).grouped(x, group_sizes) for name in self.names], axis=-1)


def declare_packed(
    in_features: int,
    out_features: int | Mapping[str, int],
    layout: Layout,
    axes: tuple[str, str],
    num_experts: int | None = None,
) -> QuantizedMatrix | QuantizedParts:
    """A packed weight, or with `out_features` a dict one for each of the parts that it names."""

    def matrix(size: int) -> QuantizedMatrix:
        return QuantizedMatrix(size, in_features, layout, axes, num_experts)

    if isinstance(out_features, Mapping):
        return QuantizedParts({name: matrix(size) for name, size in out_features.items()})
    return matrix(out_features)


def abstract_weight(out_features: int, in_features: int, layout: Layout) -> QuantizedWeight:
    """A packed weight with shapes in the place of arrays."""
    return abstract(
        out_features,
        in_features,
        format=layout.format,
        group_size=layout.group_size,
        zeros=layout.zeros,
        permutation=layout.permutation,
        scale_dtype=jnp.dtype(layout.scale_dtype),
    )


def pack_weight(weight: Canonical, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays of a QuantizedMatrix, by the names of its attributes, on the host."""
    packed = pack(*weight, format=layout.format, group_size=layout.group_size)
    zeros = packed.zeros
    if layout.zeros:  # `pack` leaves out those that are all alike, but the declaration must not depend on values
        middle = 8 if layout.format == "int4" else 0
        zeros = np.full(packed.scales.shape, middle) if zeros is None else zeros
        zeros = zeros.astype(jnp.bfloat16)  # exact: integers up to 255
    arrays = {"codes": packed.codes, "scales": packed.scales, "zeros": zeros, "permutation": packed.permutation}
    return {name: array for name, array in arrays.items() if array is not None}


def pack_stack(weights: Iterable[Canonical], count: int, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays of a stack of `count` packed weights, likewise; the weights are taken one at a time."""
    arrays: dict[str, np.ndarray] = {}
    for i, weight in enumerate(weights):
        for name, array in pack_weight(weight, layout).items():
            arrays.setdefault(name, np.empty((count, *array.shape), array.dtype))[i] = array
    return arrays


def _declare(
    array: jax.ShapeDtypeStruct | None,
    axes: tuple[str | None, ...],
    initializer: Initializer,
    num_experts: int | None,
) -> nnx.Param | None:
    if array is None:
        return None
    if num_experts is None:
        return param(array.shape, array.dtype, axes, initializer)
    return param((num_experts, *array.shape), array.dtype, ("expert", *axes), initializer)


@functools.cache
def _random_codes(format: str) -> Initializer:
    # Bit 6 of an e4m3 code is left off: without it none is NaN, and all are below 2.
    mask = np.int32(np.uint32(0xBFBFBFBF).astype(np.int32)) if format == "fp8" else np.int32(-1)

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), dtype) & mask

    return initialize


@functools.cache
def _constant(value: float) -> Initializer:
    return jax.nn.initializers.constant(value)


def _in_order(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=dtype), shape)
