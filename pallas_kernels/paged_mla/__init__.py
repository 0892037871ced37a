"""paged_mla: multi-head latent attention over pages, of one query a row and of many rows' new tokens."""

from functools import partial

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape
from pallas_kernels.paged_mla import mosaic_gpu, reference

_DECODE = {
    "mosaic_gpu": dispatch.Implementation(mosaic_gpu.mla_decode, mosaic_gpu.supported, platforms=("gpu",)),
    "interpret": dispatch.Implementation(
        partial(mosaic_gpu.mla_decode, interpret=True), partial(mosaic_gpu.supported, interpret=True), platforms=()
    ),
    "reference": dispatch.Implementation(reference.mla_decode),
}
_PREFILL = {"reference": dispatch.Implementation(reference.mla_prefill)}


def mla_decode(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    value_dim: int,
    scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Latent attention of each row's newest token over all of its KV (DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1).

    All heads share one key a token: its compressed KV, which is the value as well, and the rotary part. Queries come
    with the key's up-projection absorbed, so that they meet the compressed KV; the output goes through the value's.

    Args:
      q: [S, N, H], each head's query for the compressed KV and then its rotary part.
      pages: [P, page_size, H], per token the compressed KV and then the rotary part of the key.
      page_table: i32[S, W], the row's pages in order. Entries past the row's length may hold anything.
      kv_lens: i32[S], at most W * page_size. 0 marks an unused row, whose output is zeros.
      value_dim: elements of the compressed KV, the first ones of H (512 of 576 in DeepSeek-V2 and V3).
      scale: multiplies the scores, usually the inverse root of the head dim before absorption.

    Returns: [S, N, value_dim] in q's dtype; softmax and sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    _check("S N H", q, pages, page_table, kv_lens, value_dim)
    return dispatch.run("mla_decode", _DECODE, backend, q, pages, page_table, kv_lens, value_dim=value_dim, scale=scale)


def mla_prefill(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    *,
    value_dim: int,
    scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Latent attention of the new tokens of S rows, each over its cached prefix and, causally, its own new tokens.

    Args:
      q: [T, N, H], the rows' new tokens one row after the other, otherwise as in mla_decode.
      kv_lens: i32[S], tokens of KV, the new ones included; at most W * page_size.
      query_starts: i32[S + 1], ascending: row s owns q[query_starts[s]:query_starts[s + 1]], whose last query is at
        position kv_lens[s] - 1. Rows may own none.
      pages, page_table, value_dim, scale: as in mla_decode. The new tokens are in their pages already.

    Returns: [T, N, value_dim] in q's dtype, zeros for tokens that no row owns; softmax and sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    sizes = _check("T N H", q, pages, page_table, kv_lens, value_dim)
    if query_starts.shape != (sizes["S"] + 1,):
        raise ValueError(f"query_starts must be [S + 1] with S={sizes['S']}, got shape {list(query_starts.shape)}")
    arrays = (q, pages, page_table, kv_lens, query_starts)
    return dispatch.run("mla_prefill", _PREFILL, backend, *arrays, value_dim=value_dim, scale=scale)


def _check(query_letters, q, pages, page_table, kv_lens, value_dim) -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape("q", q, query_letters, sizes)
    check_shape("pages", pages, "P page_size H", sizes)
    check_shape("page_table", page_table, "S W", sizes)
    check_shape("kv_lens", kv_lens, "S", sizes)
    if not 1 <= value_dim <= sizes["H"]:
        raise ValueError(f"value_dim={value_dim} must be from 1 to H={sizes['H']}")
    return sizes
