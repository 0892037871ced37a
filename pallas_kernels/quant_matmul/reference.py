"""quant_matmul in plain JAX: the weight is brought back to the activations' dtype, whole, and multiplied."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.weight import TILE_COLUMNS, QuantizedWeight, dequantize, unpack_codes

_LARGEST = {jnp.float8_e4m3fn: 448.0, jnp.int8: 127.0}


@functools.partial(jax.jit, static_argnames=("activation", "out_dtype"))
def quant_matmul(x, weight: QuantizedWeight, *, activation, out_dtype):
    """See pallas_kernels.quant_matmul."""
    if weight.permutation is not None:
        x = x[..., weight.permutation]
    if activation is None:
        values = dequantize(weight).astype(x.dtype)
        return _product(x, values, jnp.float32).astype(out_dtype)
    if activation == "int8":
        codes, scales = quantize_rows(x, jnp.int8)
        sums = _product(codes, unpack_codes(weight), jnp.int32).astype(jnp.float32)
        row_scales = weight.scales[:, 0].reshape(-1)[: weight.out_features].astype(jnp.float32)
        return (sums * scales * row_scales).astype(out_dtype)
    codes, scales = quantize_rows(x, jnp.float8_e4m3fn, activation_group(weight))
    codes = jax.lax.optimization_barrier(codes)  # for XLA leaves out a conversion back and forth, and so the rounding
    values = (codes.astype(jnp.float32) * scales).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return _product(values, dequantize(weight), jnp.float32).astype(out_dtype)


def activation_group(weight: QuantizedWeight) -> int:
    """Columns of an fp8 activation that have a scale in common: a row's, or 128 where the weight has groups."""
    return -1 if weight.group_size == -1 else TILE_COLUMNS


def quantize_rows(x, dtype, group_size: int = -1) -> tuple[jax.Array, jax.Array]:
    """Codes with the smallest scale that keeps them in range, found for each row, or each `group_size` columns.

    Returns:
      codes: [..., in]; with groups [..., ceil(in / group_size), group_size], padded with zeros.
      scales: float32 [..., 1], with groups [..., groups, 1]; x is about codes * scales.
    """
    x = x.astype(jnp.float32)
    if group_size != -1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group_size)])
        x = x.reshape(*x.shape[:-1], -1, group_size)
    largest = _LARGEST[dtype]
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-12) / largest
    codes = jnp.clip(x / scales, -largest, largest)
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scales


def _product(x, w, dtype):
    """[..., in] x [out, in] -> [..., out]."""
    contract = ((x.ndim - 1,), (1,)), ((), ())
    return jax.lax.dot_general(x, w, contract, precision="highest", preferred_element_type=dtype)
