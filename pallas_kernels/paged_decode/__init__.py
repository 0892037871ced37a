"""paged_decode: attention of one query a row over the row's pages."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_attention
from pallas_kernels.paged_decode import mosaic_gpu, reference

_IMPLEMENTATIONS = {
    "mosaic_gpu": dispatch.Implementation(mosaic_gpu.paged_decode, mosaic_gpu.supported, ("gpu",)),
    "reference": dispatch.Implementation(reference.paged_decode),
}


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Attention of each row's newest token over all of its KV (Kwon et al., "PagedAttention", SOSP 2023).

    Args:
      q: [S, N, H]; N a multiple of K (grouped-query attention).
      k_pages, v_pages: [P, K, page_size, H].
      page_table: i32[S, W], the row's pages in order. Entries past the row's length may hold anything.
      kv_lens: i32[S], at most W * page_size. 0 marks an unused row, whose output is zeros.
      scale: multiplies the scores, usually H ** -0.5.

    Returns: [S, N, H] in q's dtype; softmax and sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    check_attention(q, k_pages, v_pages, page_table, kv_lens, "S N H")
    return dispatch.run(
        "paged_decode", _IMPLEMENTATIONS, backend, q, k_pages, v_pages, page_table, kv_lens, scale=scale
    )
