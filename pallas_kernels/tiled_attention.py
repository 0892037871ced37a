"""Attention of query tiles over KV pages with an online softmax: the core that the attention references share.

Online softmax: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018). Its use in attention, chunk of
keys by chunk of keys: Dao et al., "FlashAttention" (2022). Paged KV: Kwon et al., "PagedAttention" (2023).

Two loops, both with trip counts known only at run time, so that time follows the tiles and the context really there and
not the shapes: over groups of tiles, and within a group over chunks of pages. Only one chunk of one group's pages is
ever gathered. For each round of such a loop a GPU asks the host whether to go on, so what fits into one round is no
loop. How requests become tiles is the callers' business (paged_decode, ragged_prefill); this file does not know.
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


def on_this_platform(blocks: dict[str, BlockSizes]) -> BlockSizes:
    """Of sizes by platform, those of the default backend; the GPU's for any that is not named."""
    return blocks.get(jax.default_backend(), blocks["gpu"])


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
    v_pages: jax.Array | None,
    page_table: jax.Array,
    tiles: Tiles,
    *,
    scale: float,
    blocks: BlockSizes,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    value_dim: int | None = None,
) -> jax.Array:
    """Causal attention of every query in a tile over its row's pages.

    q [T, N, H]; k_pages, v_pages [P, K, page_size, H]; page_table i32[S, W]. The options are paged_decode's. Where
    v_pages is None, a token's values are the first `value_dim` elements of its key, and are not fetched again.
    Returns [T, N, H or value_dim] in q's dtype, zeros for tokens in no tile.
    """
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.astype(jnp.float32)
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
            tile_q, of_group(positions), page_table[of_group(rows)], kv, chunk_pages,
            _Scoring(scale, window, soft_cap, alibi_slopes),
        )  # fmt: skip
        return out.at[tile_tokens].set(tile_out.astype(out.dtype), mode="drop")

    values = None if v_pages is None else _Pages(v_pages, v_scales)
    kv = _KV(_Pages(k_pages, k_scales), values, value_dim if v_pages is None else v_pages.shape[3])
    out = jnp.zeros((*q.shape[:2], kv.value_dim), q.dtype)
    return _rounds(0, (tiles.count + group - 1) // group, tokens.shape[0] // group, attend_to_group, out)


class _Pages(NamedTuple):
    pages: jax.Array  # [P, K, page_size, H]
    scales: jax.Array | None  # f32[P, K, page_size] of a token's 8-bit values


class _KV(NamedTuple):
    keys: _Pages
    values: _Pages | None  # None: the first value_dim elements of the keys
    value_dim: int

    def gather(self, ids):
        """Keys and values at the page ids i32[G, C]: [G, K, C * page_size, H] and [.., value_dim]."""
        keys = _gather(self.keys, ids)
        return keys, keys[..., : self.value_dim] if self.values is None else _gather(self.values, ids)


class _Scoring(NamedTuple):
    """From products of queries and keys to scores, and which keys a query sees."""

    scale: float
    window: int | None
    soft_cap: float | None
    alibi_slopes: jax.Array | None  # f32[N]

    def scores(self, products, distances, group):
        """products [G, K, M, C]; distances i32[G, 1, M, C], how far before the query a key is; M = (group, B)."""
        scores = products * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if self.alibi_slopes is not None:
            slopes = jnp.repeat(self.alibi_slopes.reshape(-1, group), products.shape[2] // group, axis=1)
            scores -= slopes[None, :, :, None] * distances
        return scores

    def sees(self, distances):
        seen = distances >= 0
        return seen if self.window is None else seen & (distances < self.window)

    def first_key(self, positions):
        """The first key that a tile's queries at positions i32[G, B] see, i32[G]; -1 stands for no query."""
        if self.window is None:
            return jnp.zeros(positions.shape[0], jnp.int32)
        first_query = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min(axis=1)
        return jnp.maximum(first_query - (self.window - 1), 0)


def _attend_group(q, positions, page_rows, kv, chunk_pages, scoring):
    """q [G, B, N, H], positions i32[G, B], page_rows i32[G, W], W a multiple of chunk_pages -> float32 [G, B, N, V]."""
    G, B, N, H = q.shape
    K, page_size = kv.keys.pages.shape[1:3]
    V = kv.value_dim
    R = N // K  # query heads that share a KV head
    # A GPU multiplies 16-bit queries and keys exactly; a CPU is slow at it. Float32 it would round, if it were let.
    exact = jax.default_backend() != "cpu" and q.dtype.itemsize == 2 and q.dtype == kv.keys.pages.dtype
    operand = q.dtype if exact else jnp.float32
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # M = (R, B): the queries that meet the same keys are the rows of one matrix product; K and V are never repeated.
    q = q.astype(operand).reshape(G, B, K, R, H).transpose(0, 2, 3, 1, 4).reshape(G, K, R * B, H)
    query_positions = jnp.broadcast_to(positions[:, None, None, :], (G, 1, R, B)).reshape(G, 1, R * B, 1)
    first_key, last_position = scoring.first_key(positions), positions.max(axis=1)
    chunk = chunk_pages * page_size

    def add_chunk(i, state):
        # running maximum [G, K, M], sum of exponentials [G, K, M], weighted values [G, K, M, V]
        top, total, acc = state
        ids = lax.dynamic_slice_in_dim(page_rows, i * chunk_pages, chunk_pages, axis=1)
        key_positions = i * chunk + jnp.arange(chunk)
        k, v = kv.gather(ids)
        # A weight of zero does not silence a NaN: what no query of the tile sees is replaced, not only masked.
        seen = (key_positions >= first_key[:, None]) & (key_positions <= last_position[:, None])
        v = jnp.where(seen[:, None, :, None], v.astype(jnp.float32), 0)
        distances = query_positions - key_positions
        visible = scoring.sees(distances)
        products = jnp.einsum(
            "gkmh,gkch->gkmc", q, k.astype(operand), precision=precision, preferred_element_type=jnp.float32
        )
        scores = scoring.scores(products, distances, R)
        scores = jnp.where(visible, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(axis=-1)
        acc = acc * decay[..., None] + jnp.einsum("gkmc,gkcv->gkmv", weights, v, precision=precision)
        return new_top, total, acc

    start = jnp.full((G, K, R * B), MASKED), jnp.zeros((G, K, R * B)), jnp.zeros((G, K, R * B, V))
    # last_position // chunk + 1 chunks reach the farthest query's own key; none if the group has no query.
    most = page_rows.shape[1] // chunk_pages
    num_chunks = jnp.minimum(last_position.max() // chunk + 1, most)
    _, total, acc = _rounds(first_key.min() // chunk, num_chunks, most, add_chunk, start)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(G, K, R, B, V).transpose(0, 3, 1, 2, 4).reshape(G, B, N, V)


def _rounds(start, stop, most, body, state):
    """fori_loop of at most `most` rounds, which are the indices below it. A round that need not be changes nothing."""
    return body(0, state) if most == 1 else lax.fori_loop(start, stop, body, state)


def _gather(source, ids):
    """The pages at ids i32[G, C], scaled -> [G, K, C * page_size, H], float32 if there are scales, or as stored."""
    P, K, page_size, H = source.pages.shape
    G, C = ids.shape
    # One (page, head) after the other already in the order wanted: no transpose after the gather. As rows of a matrix,
    # which XLA gathers twice as fast on a CPU as the same bytes in three dimensions.
    rows = ids[:, None, :] * K + jnp.arange(K)[None, :, None]

    def take(x, width):
        return x.reshape(P * K, -1).at[rows].get(mode="promise_in_bounds").reshape(G, K, C * page_size, width)

    values = take(source.pages, H)
    return values if source.scales is None else values.astype(jnp.float32) * take(source.scales, 1)


def _pad_to_multiple(x, multiple, axis, fill):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=fill)
