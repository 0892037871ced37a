"""kv_write: new keys and values into their pages, as they are or rounded to 8 bits."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape
from pallas_kernels.kv_write import reference

_IMPLEMENTATIONS = {"reference": dispatch.Implementation(reference.kv_write)}
_QUANTIZED_IMPLEMENTATIONS = {"reference": dispatch.Implementation(reference.kv_write_quantized)}


def kv_write(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Writes one token's keys and values a row into the pages of one layer; in place when the pages are donated.

    Args:
      k_pages, v_pages: [P, K, page_size, H].
      k, v: [T, K, H], in the pages' dtype.
      slots: i32[T], page * page_size + offset. A slot of P * page_size or more (padding) is dropped; no slot may occur
        twice, padding included.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    _check(k_pages, v_pages, k, v, slots)
    return dispatch.run("kv_write", _IMPLEMENTATIONS, backend, k_pages, v_pages, k, v, slots)


def kv_write_quantized(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_scales: jax.Array,
    v_scales: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rounds keys and values to the pages' 8-bit dtype and writes codes and scales; in place when these are donated.

    Each token's H values of a head have a scale of their own, their largest absolute value over the dtype's (448 of
    float8_e4m3fn, 127 of int8), so that a token's codes depend on nothing but the token.

    Args:
      k_pages, v_pages: int8 or float8_e4m3fn [P, K, page_size, H].
      k_scales, v_scales: f32[P, K, page_size], what a token's codes are multiplied with to have its values back.
      k, v: [T, K, H], of any float dtype. Zeros give codes of zero.
      slots: as in kv_write.

    Returns: the four arrays of pages and scales.

    Raises: ValueError naming the argument whose shape or dtype does not fit.
    """
    sizes = _check(k_pages, v_pages, k, v, slots)
    for name, pages, scales in (("k", k_pages, k_scales), ("v", v_pages, v_scales)):
        if jnp.dtype(pages.dtype) not in reference.LARGEST:
            raise ValueError(f"{name}_pages must be int8 or float8_e4m3fn, got {pages.dtype}")
        check_shape(f"{name}_scales", scales, "P K page_size", sizes)
    arrays = (k_pages, v_pages, k_scales, v_scales, k, v, slots)
    return dispatch.run("kv_write_quantized", _QUANTIZED_IMPLEMENTATIONS, backend, *arrays)


def _check(k_pages, v_pages, k, v, slots) -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape("k_pages", k_pages, "P K page_size H", sizes)
    check_shape("v_pages", v_pages, "P K page_size H", sizes)
    check_shape("k", k, "T K H", sizes)
    check_shape("v", v, "T K H", sizes)
    check_shape("slots", slots, "T", sizes)
    return sizes
