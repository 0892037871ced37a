"""paged_mla in plain JAX, by way of tiled_attention: one KV head, whose values are the beginning of its keys."""

import functools

import jax

from pallas_kernels.paged_decode.reference import tile_per_row
from pallas_kernels.ragged_prefill.reference import cut_into_tiles
from pallas_kernels.tiled_attention import BlockSizes, attend, on_this_platform

# Fewer queries at once than in the other references: each is up to 128 heads of 576 elements.
_DECODE_BLOCKS = {"cpu": BlockSizes(queries=1, tiles=8, keys=64), "gpu": BlockSizes(queries=1, tiles=64, keys=256)}
_PREFILL_BLOCKS = {"cpu": BlockSizes(queries=16, tiles=2, keys=128), "gpu": BlockSizes(queries=16, tiles=16, keys=512)}


@functools.partial(jax.jit, static_argnames=("value_dim", "scale"))
def mla_decode(q, pages, page_table, kv_lens, *, value_dim, scale):
    """See pallas_kernels.paged_mla."""
    return _attend(q, pages, page_table, tile_per_row(kv_lens), _DECODE_BLOCKS, value_dim=value_dim, scale=scale)


@functools.partial(jax.jit, static_argnames=("value_dim", "scale"))
def mla_prefill(q, pages, page_table, kv_lens, query_starts, *, value_dim, scale):
    """See pallas_kernels.paged_mla."""
    tile = min(on_this_platform(_PREFILL_BLOCKS).queries, q.shape[0])
    tiles = cut_into_tiles(query_starts, kv_lens, q.shape[0], tile)
    return _attend(q, pages, page_table, tiles, _PREFILL_BLOCKS, value_dim=value_dim, scale=scale)


def _attend(q, pages, page_table, tiles, blocks, **options):
    return attend(q, pages[:, None], None, page_table, tiles, blocks=on_this_platform(blocks), **options)
