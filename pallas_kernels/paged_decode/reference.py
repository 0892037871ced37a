"""paged_decode in plain JAX, by way of tiled_attention: every row is a tile."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tiled_attention import BlockSizes, Tiles, attend

# Measured on a CPU: what a step gathers must stay in the cache. 128 keys took up to 1.5 times as long (K * H = 512).
_BLOCKS = {"cpu": BlockSizes(queries=1, tiles=8, keys=64), "gpu": BlockSizes(queries=1, tiles=256, keys=256)}


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_decode(q, k_pages, v_pages, page_table, kv_lens, *, scale, **options):
    """See pallas_kernels.paged_decode."""
    blocks = _BLOCKS.get(jax.default_backend(), _BLOCKS["gpu"])
    queries = q.shape[1] if q.ndim == 4 else 1
    flat, tiles = q.reshape(-1, *q.shape[-2:]), tile_per_row(kv_lens, queries)
    out = attend(flat, k_pages, v_pages, page_table, tiles, scale=scale, blocks=blocks, **options)
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
