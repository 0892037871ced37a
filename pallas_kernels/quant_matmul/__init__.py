"""quant_matmul: products with weights that stay int4, int8 or fp8 on the device."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import mosaic_gpu, reference
from pallas_kernels.quant_matmul.weight import QuantizedWeight, abstract, concatenate, dequantize, pack

__all__ = ["QuantizedWeight", "abstract", "concatenate", "dequantize", "pack", "quant_matmul"]

_IMPLEMENTATIONS = {
    "mosaic_gpu": dispatch.Implementation(mosaic_gpu.quant_matmul, mosaic_gpu.supported, ("gpu",)),
    "reference": dispatch.Implementation(reference.quant_matmul),
}


def quant_matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    *,
    activation: Literal["fp8", "int8"] | None = None,
    out_dtype=None,
    backend: str | None = None,
) -> jax.Array:
    """x times the transposed weight, x @ dequantize(weight).T, summed in float32.

    Args:
      x: [..., in_features] bfloat16 or float16, float32 too in the reference. The weight's permutation is applied here.
      activation: None multiplies x as it is. "fp8" with an fp8 weight, "int8" with an int8 weight of group_size -1
        without zeros: x is rounded to that type first, with a scale for each token, found here (Dettmers et al.,
        "LLM.int8()", 2022), and for fp8 weights with groups for each token and 128 columns (DeepSeek-V3, 2024).
      out_dtype: x's if None.

    Returns: [..., out_features].

    Raises: ValueError naming the argument that does not fit.
    """
    if x.ndim == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., in_features={weight.in_features}], got shape {list(x.shape)}")
    if activation not in (None, "fp8", "int8"):
        raise ValueError(f"activation must be None, 'fp8' or 'int8', got {activation!r}")
    if activation is not None and activation != weight.format:
        raise ValueError(f"activation {activation!r} needs a weight of that format, got {weight.format!r}")
    if activation == "int8" and (weight.group_size != -1 or weight.zeros is not None):
        raise ValueError(f"activation 'int8' needs group_size -1 and no zeros, got group_size {weight.group_size}")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    return dispatch.run(
        "quant_matmul", _IMPLEMENTATIONS, backend, x, weight, activation=activation, out_dtype=out_dtype
    )
