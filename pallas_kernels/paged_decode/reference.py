"""paged_decode in plain JAX, by way of tiled_attention: every row is a tile."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tiled_attention import BlockSizes, Tiles, attend, on_this_platform


def _blocks(num_rows: int) -> BlockSizes:
    return on_this_platform(
        {
            # Measured: what a step gathers must stay in the cache. 128 keys took up to 1.5 times as long (K * H = 512).
            "cpu": BlockSizes(queries=1, tiles=8, keys=64),
            # As many keys of few rows as of many: the fewer rounds, the fewer times the host is asked.
            "gpu": BlockSizes(queries=1, tiles=256, keys=min(max(2**15 // num_rows, 256), 4096)),
        }
    )


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_decode(q, k_pages, v_pages, page_table, kv_lens, *, scale, **options):
    """See pallas_kernels.paged_decode."""
    queries = q.shape[1] if q.ndim == 4 else 1
    flat, tiles = q.reshape(-1, *q.shape[-2:]), tile_per_row(kv_lens, queries)
    out = attend(flat, k_pages, v_pages, page_table, tiles, scale=scale, blocks=_blocks(q.shape[0]), **options)
    return out.reshape(q.shape)


def tile_per_row(kv_lens: jax.Array, queries: int = 1) -> Tiles:
    """A tile of each row in use, of its last `queries` tokens, whose queries lie in [S * queries, N, H]."""
    # Rows of like length go together: a group of tiles takes as long as its longest row, and unused rows come last.
    order = jnp.argsort(-kv_lens).astype(jnp.int32)
    query = jnp.arange(queries, dtype=jnp.int32)
    return Tiles(
        tokens=order[:, None] * queries + query,
        positions=jnp.maximum(kv_lens[order][:, None] - queries + query, -1),
        rows=order,
        count=jnp.sum(kv_lens > 0),
    )
