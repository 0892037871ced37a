"""ragged_prefill in plain JAX, by way of tiled_attention: every row is cut into tiles of a few queries."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tiled_attention import BlockSizes, Tiles, attend, on_this_platform

_BLOCKS = {"cpu": BlockSizes(queries=64, tiles=2, keys=128), "gpu": BlockSizes(queries=128, tiles=16, keys=512)}


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def ragged_prefill(q, k_pages, v_pages, page_table, kv_lens, query_starts, *, scale, **options):
    """See pallas_kernels.ragged_prefill."""
    blocks = on_this_platform(_BLOCKS)
    tiles = cut_into_tiles(query_starts, kv_lens, q.shape[0], min(blocks.queries, q.shape[0]))
    return attend(q, k_pages, v_pages, page_table, tiles, scale=scale, blocks=blocks, **options)


def cut_into_tiles(query_starts: jax.Array, kv_lens: jax.Array, num_tokens: int, size: int) -> Tiles:
    """Tiles of `size` queries, each of one row; a row's last may be partly empty.

    There are at most T // size + S of them (and no more than T), the shape's bound; `count` says how many there are.
    """
    num_rows = kv_lens.shape[0]
    counts = query_starts[1:] - query_starts[:-1]
    tiles_of_row = (counts + size - 1) // size
    ends = jnp.cumsum(tiles_of_row, dtype=jnp.int32)
    index = jnp.arange(min(num_tokens, num_tokens // size + num_rows), dtype=jnp.int32)
    rows = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_rows - 1).astype(jnp.int32)
    within = (index - (ends - tiles_of_row)[rows])[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    exists = (within < counts[rows][:, None]) & (index < ends[-1])[:, None]
    return Tiles(
        tokens=jnp.where(exists, query_starts[rows][:, None] + within, num_tokens),
        positions=jnp.where(exists, (kv_lens - counts)[rows][:, None] + within, -1),
        rows=rows,
        count=ends[-1],
    )
