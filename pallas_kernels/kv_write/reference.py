"""kv_write as a scatter. XLA does it in place on donated pages.

On a CPU it does so for float32 and int8 alone, and copies all pages to a wider dtype and back for smaller floats.

It must be told that no slot occurs twice: else a GPU writes each 16-bit value by a compare-and-swap loop.
"""

import jax
import jax.numpy as jnp

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}  # the largest code of each dtype


@jax.jit
def kv_write(k_pages, v_pages, k, v, slots):
    """See pallas_kernels.kv_write."""
    return _scatter(k_pages, k, slots), _scatter(v_pages, v, slots)


@jax.jit
def kv_write_quantized(k_pages, v_pages, k_scales, v_scales, k, v, slots):
    """See pallas_kernels.kv_write."""
    (k, k_scale), (v, v_scale) = (_quantize(x, k_pages.dtype) for x in (k, v))
    arrays = ((k_pages, k), (v_pages, v), (k_scales, k_scale), (v_scales, v_scale))
    return tuple(_scatter(pages, new, slots) for pages, new in arrays)


def _scatter(pages, new, slots):
    """pages [P, K, page_size, ...] with new [T, K, ...] at their slots."""
    num_heads, page_size = pages.shape[1:3]
    page, offset = slots // page_size, slots % page_size
    if len(slots) == 1:  # head by head: one update alone XLA writes as a slice, and reads it first should it be dropped
        return pages.at[page, jnp.arange(num_heads), offset].set(new[0], mode="drop", unique_indices=True)
    return pages.at[page, :, offset].set(new, mode="drop", unique_indices=True)


def _quantize(x, dtype):
    """x [T, K, H] -> codes [T, K, H] in dtype and scales f32[T, K]."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / LARGEST[jnp.dtype(dtype)]
    # What is smaller a device may take for zero, and a division by it gives NaN.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1, scales)
    scaled = x / scales[..., None]
    return (jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled).astype(dtype), scales
