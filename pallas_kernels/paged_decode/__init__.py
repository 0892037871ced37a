"""paged_decode: attention of one query a row over the row's pages."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_attention, check_options
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
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of each row's newest token over all of its KV (Kwon et al., "PagedAttention", SOSP 2023).

    Args:
      q: [S, N, H]; N a multiple of K (grouped-query attention).
      k_pages, v_pages: [P, K, page_size, H].
      page_table: i32[S, W], the row's pages in order. Entries past the row's length may hold anything.
      kv_lens: i32[S], at most W * page_size. 0 marks an unused row, whose output is zeros.
      scale: multiplies the scores, usually H ** -0.5.
      window: a query sees the last `window` keys alone, its own among them (Beltagy et al., "Longformer", 2020).
      soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap) (Gemma 2).
      alibi_slopes: f32[N]; a key `d` tokens before the query loses slope * d (Press et al., "ALiBi", ICLR 2022).
      k_scales, v_scales: f32[P, K, page_size], for pages of int8 or float8_e4m3fn: what a token's values are multiplied
        with. None for other dtypes.

    Returns: [S, N, H] in q's dtype; softmax and sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    sizes = check_attention(q, k_pages, v_pages, page_table, kv_lens, "S N H")
    options = check_options(sizes, k_pages, window, soft_cap, alibi_slopes, k_scales, v_scales)
    return dispatch.run(
        "paged_decode", _IMPLEMENTATIONS, backend, q, k_pages, v_pages, page_table, kv_lens, scale=scale, **options
    )
