"""Attention of query tiles over KV pages with an online softmax: the core that the attention references share.

Online softmax: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018). Its use in attention, chunk of
keys by chunk of keys: Dao et al., "FlashAttention" (2022). Paged KV: Kwon et al., "PagedAttention" (2023).

Two loops, both with trip counts known only at run time, so that time follows the tiles and the context really there and
not the shapes: over groups of tiles, and within a group over chunks of pages. Only one chunk of one group's pages is
ever gathered. How requests become tiles is the callers' business (paged_decode, ragged_prefill); this file does not
know.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Finite, so that the difference of two masked scores is 0 and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class BlockSizes(NamedTuple):
    """How much is computed at once: `queries` a tile, `tiles` a group, `keys` of each tile's row (in whole pages)."""

    queries: int
    tiles: int
    keys: int


class Tiles(NamedTuple):
    """M tiles of B queries each; a tile's queries all belong to one row of the page table.

    tokens     i32[M, B]: where the query is in the flat q [T, N, H]; >= T where there is none
    positions  i32[M, B]: the query's position in its sequence, which is the last key that it sees; -1 where none
    rows       i32[M]: the tile's row of the page table
    count      i32[]: only the first `count` tiles are looked at
    """

    tokens: jax.Array
    positions: jax.Array
    rows: jax.Array
    count: jax.Array


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    tiles: Tiles,
    *,
    scale: float,
    blocks: BlockSizes,
) -> jax.Array:
    """Causal attention of every query in a tile over its row's pages.

    q [T, N, H]; k_pages, v_pages [P, K, page_size, H]; page_table i32[S, W]. Returns [T, N, H] in q's dtype, zeros for
    tokens in no tile.
    """
    num_pages, _, page_size, _ = k_pages.shape
    chunk_pages = min(max(1, blocks.keys // page_size), page_table.shape[1])
    group = min(blocks.tiles, tiles.rows.shape[0])
    # Entries that nobody filled may hold anything: made harmless here, masked by position below.
    page_table = _pad_to_multiple(jnp.clip(page_table, 0, num_pages - 1), chunk_pages, axis=1, fill=0)
    tokens = _pad_to_multiple(tiles.tokens, group, axis=0, fill=q.shape[0])
    positions = _pad_to_multiple(tiles.positions, group, axis=0, fill=-1)
    rows = _pad_to_multiple(tiles.rows, group, axis=0, fill=0)

    def attend_to_group(i, out):
        def of_group(x):
            return lax.dynamic_slice_in_dim(x, i * group, group)

        tile_tokens = of_group(tokens)
        tile_q = q.at[tile_tokens].get(mode="fill", fill_value=0)
        tile_out = _attend_group(
            tile_q, of_group(positions), page_table[of_group(rows)], k_pages, v_pages, scale, chunk_pages
        )
        return out.at[tile_tokens].set(tile_out.astype(out.dtype), mode="drop")

    return lax.fori_loop(0, (tiles.count + group - 1) // group, attend_to_group, jnp.zeros_like(q))


def _attend_group(q, positions, page_rows, k_pages, v_pages, scale, chunk_pages):
    """q [G, B, N, H], positions i32[G, B], page_rows i32[G, W], W a multiple of chunk_pages -> float32 [G, B, N, H]."""
    G, B, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    R = N // K  # query heads that share a KV head
    # M = (R, B): the queries that meet the same keys are the rows of one matrix product; K and V are never repeated.
    q = (q.astype(jnp.float32) * scale).reshape(G, B, K, R, H).transpose(0, 2, 3, 1, 4).reshape(G, K, R * B, H)
    query_positions = jnp.broadcast_to(positions[:, None, None, :], (G, 1, R, B)).reshape(G, 1, R * B, 1)
    last_position = positions.max(axis=1)
    chunk = chunk_pages * page_size

    def add_chunk(i, state):
        top, total, acc = (
            state  # running maximum [G, K, M], sum of exponentials [G, K, M], weighted values [G, K, M, H]
        )
        ids = lax.dynamic_slice_in_dim(page_rows, i * chunk_pages, chunk_pages, axis=1)
        key_positions = i * chunk + jnp.arange(chunk)
        k, v = _gather(k_pages, ids), _gather(v_pages, ids)
        # A weight of zero does not silence a NaN: what lies past the row's end is replaced, not only masked.
        v = jnp.where((key_positions <= last_position[:, None])[:, None, :, None], v, 0)
        visible = key_positions <= query_positions
        scores = jnp.where(visible, jnp.einsum("gkmh,gkch->gkmc", q, k), MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(axis=-1)
        acc = acc * decay[..., None] + jnp.einsum("gkmc,gkch->gkmh", weights, v)
        return new_top, total, acc

    start = jnp.full((G, K, R * B), MASKED), jnp.zeros((G, K, R * B)), jnp.zeros((G, K, R * B, H))
    # last_position // chunk + 1 chunks reach the farthest query's own key; none if the group has no query.
    num_chunks = jnp.minimum(last_position.max() // chunk + 1, page_rows.shape[1] // chunk_pages)
    _, total, acc = lax.fori_loop(0, num_chunks, add_chunk, start)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(G, K, R, B, H).transpose(0, 3, 1, 2, 4).reshape(G, B, N, H)


def _gather(pages, ids):
    """pages [P, K, page_size, H] at ids i32[G, C] -> float32 [G, K, C * page_size, H]."""
    P, K, page_size, H = pages.shape
    G, C = ids.shape
    # One (page, head) after the other already in the order wanted: no transpose after the gather. As rows of a matrix,
    # which XLA gathers twice as fast on a CPU as the same bytes in three dimensions.
    rows = ids[:, None, :] * K + jnp.arange(K)[None, :, None]
    flat = pages.reshape(P * K, page_size * H).at[rows].get(mode="promise_in_bounds")
    return flat.reshape(G, K, C * page_size, H).astype(jnp.float32)


def _pad_to_multiple(x, multiple, axis, fill):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=fill)
