"""ragged_prefill for Hopper in Pallas Mosaic GPU.

After Shah et al., "FlashAttention-3" (2024): of three warpgroups one only fetches and two compute, 64 rows each. A
step's softmax runs beside the products of the step before and beside the other warpgroup's. A job is one tile, up to
128 rows: tokens that lie one after the other in the flat q and belong to one sequence, for one or several query heads
of a KV head. Every page is one TMA copy. There is a block for each multiprocessor, and its jobs are one pipeline: the
next one's queries and first keys are there before the last one's output leaves. 8-bit pages are made 16-bit in shared
memory by the fetching warpgroup.

What is particular to ragged and paged input:
- A tile starts at a multiple of 8 tokens, as TMA wants it, so a sequence's first tile may begin with another's queries
  and its last end with them. They are computed like the others, and not stored.
- Tokens that no row owns make up two more rows, which have no keys. Their output comes out as zeros.
- Values past a row's end may be NaN, which a weight of zero does not silence: the fetching warpgroup replaces them.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.ragged_prefill.kernel import Inputs, kernel, scratch
from pallas_kernels.ragged_prefill.schedule import cut_into_tiles
from pallas_kernels.ragged_prefill.sizes import (
    ALIGN,
    ROWS,
    TILE,
    Config,
    Sizes,
    choose_config,
    heads_in_tile,
    out_columns,
    room,
)


def supported(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
    query_starts,
    *,
    scale,
    config=None,
    interpret=False,
    window=None,
    soft_cap=None,
    alibi_slopes=None,
    k_scales=None,
    v_scales=None,
):
    """None, or why this kernel cannot take the call."""
    H, page_size = q.shape[2], k_pages.shape[2]
    config = config or choose_config(H, k_pages.dtype, alibi_slopes is not None)
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes queries of bfloat16 or float16, got {q.dtype}"
    if k_pages.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn) or k_pages.dtype != v_pages.dtype:
        return f"takes pages of {q.dtype}, int8 or float8_e4m3fn, got {k_pages.dtype} and {v_pages.dtype}"
    if H % 16 or not 64 <= H <= 256:
        return f"takes a head dim that is a multiple of 16 from 64 to 256, got {H}"
    if page_size % ALIGN or config.block_kv % page_size:
        return f"takes a page size that is a multiple of {ALIGN} and divides {config.block_kv}, got {page_size}"
    if k_scales is not None and page_size % 32:
        # TMA writes to multiples of 128 bytes, and a page's scales lie behind the last one's.
        return f"takes pages of {k_pages.dtype} of a multiple of 32 tokens, got {page_size}"
    if room(H, k_pages.dtype, config) is None:
        return f"{config} needs more shared memory than there is for head dim {H}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def ragged_prefill(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
    query_starts,
    *,
    scale,
    window=None,
    soft_cap=None,
    alibi_slopes=None,
    k_scales=None,
    v_scales=None,
    config: Config | None = None,
    interpret=False,
):
    """See pallas_kernels.ragged_prefill. `config`: instead of choose_config's; `interpret`: for a CPU, slowly."""
    T, N, H = q.shape
    P, K, page_size, _ = k_pages.shape
    config = config or choose_config(H, k_pages.dtype, alibi_slopes is not None)
    pack = heads_in_tile(N // K, config)
    padded = max(ROWS // pack, T + -T % ALIGN)
    q = jnp.pad(q, ((0, padded - T), (0, 0), (0, 0)))
    tiles, count = cut_into_tiles(query_starts, kv_lens, padded, TILE // pack, config.heavy_first)
    blocks = min(tiles.rows.shape[0] * N // pack, config.blocks or mosaic.num_multiprocessors())
    sizes = Sizes(
        padded, N, K, H, P, page_table.shape[1], page_size, q.dtype, k_pages.dtype, scale, window, soft_cap, config,
        pack, blocks, interpret,
    )  # fmt: skip
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.astype(jnp.float32)
    inputs = Inputs(page_table, q, k_pages, v_pages, alibi_slopes, k_scales, v_scales)._asdict()
    inputs = {name: array for name, array in inputs.items() if array is not None}
    out = mosaic.kernel(
        functools.partial(kernel, sizes, tuple(inputs)),
        out_type=jax.ShapeDtypeStruct((padded, N, out_columns(H)[0]), q.dtype),
        scratch_types=scratch(sizes),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack(tiles, axis=1), count[None], *inputs.values())
    return out[:T, :, :H]
