"""paged_decode in plain JAX, by way of tiled_attention: every row is a tile of one query."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tiled_attention import BlockSizes, Tiles, attend

# Measured on a CPU: what a step gathers must stay in the cache. 128 keys took up to 1.5 times as long (K * H = 512).
_BLOCKS = {"cpu": BlockSizes(queries=1, tiles=8, keys=64), "gpu": BlockSizes(queries=1, tiles=256, keys=256)}


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_decode(q, k_pages, v_pages, page_table, kv_lens, *, scale, **options):
    """See pallas_kernels.paged_decode."""
    # Rows of like length go together: a group of tiles takes as long as its longest row, and unused rows come last.
    order = jnp.argsort(-kv_lens).astype(jnp.int32)
    tiles = Tiles(
        tokens=order[:, None],
        positions=(kv_lens - 1)[order][:, None],
        rows=order,
        count=jnp.sum(kv_lens > 0),
    )
    blocks = _BLOCKS.get(jax.default_backend(), _BLOCKS["gpu"])
    return attend(q, k_pages, v_pages, page_table, tiles, scale=scale, blocks=blocks, **options)
