"""ragged_prefill: causal attention of many rows' new tokens, flat, over each row's pages."""

from functools import partial

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_attention, check_options
from pallas_kernels.ragged_prefill import mosaic_gpu, reference

_IMPLEMENTATIONS = {
    "mosaic_gpu": dispatch.Implementation(mosaic_gpu.ragged_prefill, mosaic_gpu.supported, platforms=("gpu",)),
    "interpret": dispatch.Implementation(
        partial(mosaic_gpu.ragged_prefill, interpret=True), partial(mosaic_gpu.supported, interpret=True), platforms=()
    ),
    "reference": dispatch.Implementation(reference.ragged_prefill),
}


def ragged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of the new tokens of S rows, each over its cached prefix and, causally, its own new tokens.

    Args:
      q: [T, N, H], the rows' new tokens one row after the other; N a multiple of K.
      k_pages, v_pages: [P, K, page_size, H]; the new tokens' keys and values are in them already.
      page_table: i32[S, W], the row's pages in order. Entries past the row's length may hold anything.
      kv_lens: i32[S], tokens of KV, the new ones included; at most W * page_size.
      query_starts: i32[S + 1], ascending: row s owns q[query_starts[s]:query_starts[s + 1]], whose last query is at
        position kv_lens[s] - 1. Rows may own none.
      scale: multiplies the scores, usually H ** -0.5.
      window, soft_cap, alibi_slopes, k_scales, v_scales: as in paged_decode.

    Returns: [T, N, H] in q's dtype, zeros for tokens that no row owns; softmax and sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    sizes = check_attention(q, k_pages, v_pages, page_table, kv_lens, "T N H")
    if query_starts.shape != (sizes["S"] + 1,):
        raise ValueError(f"query_starts must be [S + 1] with S={sizes['S']}, got shape {list(query_starts.shape)}")
    options = check_options(sizes, k_pages, window, soft_cap, alibi_slopes, k_scales, v_scales)
    arrays = (q, k_pages, v_pages, page_table, kv_lens, query_starts)
    return dispatch.run("ragged_prefill", _IMPLEMENTATIONS, backend, *arrays, scale=scale, **options)
