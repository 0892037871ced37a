"""The tiles of ragged_prefill's Hopper kernel, cut by XLA once for all layers of a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_prefill.sizes import ALIGN


class Tiles(NamedTuple):
    """M tiles, each i32[M].

    rows    the tile's row of the page table
    first   its first token, a multiple of 8
    lo, hi  the tokens in it that belong to the row: lo <= token < hi; an empty tile has lo == hi
    offset  what to add to a token for its position in the sequence
    kv_len  the row's
    """

    rows: jax.Array
    first: jax.Array
    lo: jax.Array
    hi: jax.Array
    offset: jax.Array
    kv_len: jax.Array


def cut_into_tiles(query_starts, kv_lens, num_tokens, size, heavy_first) -> tuple[Tiles, jax.Array]:
    """The tiles of `size` tokens of S rows and of the tokens before and after these; and how many are not empty."""
    zero, end = jnp.zeros(1, jnp.int32), jnp.full(1, num_tokens, jnp.int32)
    starts = jnp.concatenate([zero, query_starts.astype(jnp.int32), end])
    begin, stop = starts[:-1], starts[1:]
    num_rows = begin.shape[0]
    # A row's first query is at position kv_len - count. Without keys: so far below zero that no query sees any.
    kv_len = jnp.concatenate([zero, kv_lens.astype(jnp.int32), zero])
    offset = jnp.where(kv_len > 0, kv_len - stop, -num_tokens)
    aligned = begin - begin % ALIGN
    count = jnp.where(begin < stop, (stop - aligned + size - 1) // size, 0)
    ends = jnp.sum(jnp.where(jnp.tri(num_rows, dtype=bool), count, 0), axis=1)

    index = jnp.arange((num_tokens + num_rows * (size + ALIGN - 2)) // size, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1), num_rows - 1)
    exists = index < ends[-1]
    first = aligned[row] + (index - (ends - count)[row]) * size
    lo, hi = jnp.maximum(first, begin[row]), jnp.minimum(first + size, stop[row])
    tiles = Tiles(
        rows=jnp.clip(row - 1, 0, num_rows - 3),
        first=jnp.where(exists, first, 0),
        lo=jnp.where(exists, lo, 0),
        hi=jnp.where(exists, hi, 0),
        offset=offset[row],
        kv_len=kv_len[row],
    )
    return _heaviest_first(tiles, exists) if heavy_first else tiles, ends[-1]


def _heaviest_first(tiles, exists):
    """Rows with most keys first, and in a row its last tiles. Those of a row run together, as they share its keys."""
    index = jnp.arange(exists.shape[0])
    before = jnp.zeros((exists.shape[0],) * 2, bool)
    equal = ~before
    for key in (jnp.where(exists, tiles.kv_len, -1), -tiles.rows, index):
        before |= equal & (key[:, None] < key)
        equal &= key[:, None] == key
    rank = jnp.sum(before, axis=1)  # counted, not sorted: a sort is a dozen kernels
    order = jnp.sum(jnp.where(rank == index[:, None], index, 0), axis=1)
    return Tiles(*(x[order] for x in tiles))
