"""kv_write: new keys and values into their pages."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape
from pallas_kernels.kv_write import reference

_IMPLEMENTATIONS = {"reference": dispatch.Implementation(reference.kv_write)}


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
    sizes: dict[str, int] = {}
    check_shape("k_pages", k_pages, "P K page_size H", sizes)
    check_shape("v_pages", v_pages, "P K page_size H", sizes)
    check_shape("k", k, "T K H", sizes)
    check_shape("v", v, "T K H", sizes)
    check_shape("slots", slots, "T", sizes)
    return dispatch.run("kv_write", _IMPLEMENTATIONS, backend, k_pages, v_pages, k, v, slots)
