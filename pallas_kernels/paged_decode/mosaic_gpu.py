"""paged_decode for Hopper: split-KV flash decoding in Pallas Mosaic GPU.

Flash-decoding: Dao et al. (2023). Cutting the whole batch into equal parts whatever the rows' lengths: Sanovar et al.,
"Lean Attention" (2024), after "Stream-K", Osama et al. (2023).

All KV of the batch is one sequence of blocks of keys, ordered by (row, KV head, position). Each of a fixed number of
CTAs takes an equal share, so that no CTA waits for another however ragged the batch:

    row 0          row 1                   row 2
    [head 0][head 1][  head 0  ][  head 1  ][0][1]
    |- CTA 0 -|- CTA 1 -|- CTA 2 -|- CTA 3 -|CTA 4|

The part of one (row, head) in one CTA is a *segment*. A CTA whose first segment began in an earlier one writes its
sums to a workspace; the CTA that holds the beginning adds them to its own. It comes to them last and finds them ready,
for the others did them first. (The other way round, every CTA would wait for the one before it.) Shares are dealt out
from the last to the first, so that a CTA waits for such alone as have started before it.

A row's segments begin with the first block that a query sees (see schedule.py), so a window is not paid for beyond its
length. Only blocks that some query does not see in whole are masked.

In a CTA, one warpgroup copies pages to shared memory and runs ahead over segment ends, another computes. Scores are
computed transposed, keys x queries, for the tensor cores want 64 rows and a group of query heads has 1 to 64. When a
row has several queries, these and the heads of a group are columns alike.

Head dims below 64 are folded: the KV of `fold` consecutive tokens, which lie one after the other in a page, are one
line of 64, and a query becomes `fold` pseudo-queries, (q, 0) and (0, q), which see every fold-th token. What they find
is joined outside the kernel.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.paged_decode.kernel import LINE, LOG2_E, Inputs, Sizes, kernel, scratch
from pallas_kernels.paged_decode.schedule import Span, cut

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
HEAD_DIMS_OF_8_BITS = (64, 128, 256)
# What pages of 8 bits become for the tensor cores: what the hardware converts them to in the fewest instructions.
PRODUCT_DTYPES = {jnp.dtype(jnp.int8): jnp.bfloat16, jnp.dtype(jnp.float8_e4m3fn): jnp.float16}


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_keys: keys of one step, a multiple of 64 and of the page size.
      stages: blocks of keys under way in a CTA.
      num_ctas: parts that the batch is cut into. They need not run at once.
    """

    block_keys: int
    stages: int
    num_ctas: int


def default_config(tile: int, H: int, kv_dtype=jnp.bfloat16, segments: int = 2**30) -> Config:
    """The configuration for tiles of `tile` columns, and for `segments` rows times KV heads.

    Two CTAs on a multiprocessor, so that one loads while the other computes, if shared memory has room for it; one
    where a row and head are cut into many parts, for the fewer parts there are the sooner they are merged, and for
    int8, whose conversion takes the registers of two.
    """
    block = 64
    for ctas in (1,) if 4 * segments < mosaic.num_multiprocessors() or jnp.dtype(kv_dtype) == jnp.int8 else (2, 1):
        fixed = _shared_bytes(tile, H, block, 0, kv_dtype)
        stages = (mosaic.SHARED_MEMORY // ctas - fixed) // (_shared_bytes(tile, H, block, 1, kv_dtype) - fixed)
        if stages >= 3:
            break
    return Config(block, min(stages, 8), ctas * mosaic.num_multiprocessors())


def _shared_bytes(tile, H, block, stages, kv_dtype=jnp.bfloat16):
    """Of a CTA: what kernel.scratch allocates, and the compiler's own."""
    V = H + -H % LINE
    itemsize = jnp.dtype(kv_dtype).itemsize
    of_8_bits = itemsize == 1
    stage = block * ((H + V) * itemsize + 8 * of_8_bits)
    return stage * stages + 2 * tile * (2 * H + V + block) + 2 * block * H * of_8_bits + 4 * 1024


def supported(q, k_pages, v_pages, page_table, kv_lens, *, scale, interpret=False, **options) -> str | None:
    """Why the kernel cannot take the call, or None."""
    del v_pages, page_table, kv_lens, scale, options
    queries, (N, H) = q.shape[1] if q.ndim == 4 else 1, q.shape[-2:]
    K, page_size = k_pages.shape[1:3]
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype not in (q.dtype, *PRODUCT_DTYPES):
        return f"q {q.dtype} with KV {k_pages.dtype}, bfloat16 or float16 for q and the same or 8 bits for KV is needed"
    of_8_bits = k_pages.dtype in PRODUCT_DTYPES
    if H not in (HEAD_DIMS_OF_8_BITS if of_8_bits else HEAD_DIMS):
        dims = HEAD_DIMS_OF_8_BITS if of_8_bits else HEAD_DIMS
        return f"head dim {H} with KV {k_pages.dtype}, one of {', '.join(map(str, dims))} is needed"
    if page_size not in ((32, 64) if of_8_bits else (16, 32, 64)):
        # A page's scales are a copy of their own, and these start at multiples of 128 bytes in shared memory.
        return f"page size {page_size} with KV {k_pages.dtype}, one of {'' if of_8_bits else '16, '}32, 64 is needed"
    columns, largest = N // K * queries, min(64, 64 * 128 // H) // max(1, LINE // H)
    if columns > largest:
        heads = f"{N // K} query heads a KV head of head dim {H}" + f" and {queries} queries a row" * (queries > 1)
        return f"{heads}, at most {largest} fit in registers"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def paged_decode(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
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
    """See pallas_kernels.paged_decode. `config`: instead of default_config's; `interpret`: for a CPU, slowly."""
    shape = q.shape
    S, Q, N, H = q.shape if q.ndim == 4 else (q.shape[0], 1, *q.shape[1:])
    P, K, page_size, _ = k_pages.shape
    heads = N // K
    q = q.reshape(S, Q, K, heads, H)
    if Q > 1:
        q = q.swapaxes(1, 2)
    fold = LINE // H if H < LINE else 1
    columns = q.reshape(S, K, Q * heads, H)
    if fold > 1:
        columns = columns[:, :, :, None, None, :] * jnp.eye(fold, dtype=q.dtype)[:, :, None]
        k_pages, v_pages = (pages.reshape(P, K, page_size // fold, LINE) for pages in (k_pages, v_pages))
    group = Q * heads * fold
    tile, padded = _tile(K, group)
    tiles = functools.partial(_cut_into_tiles, tile=tile, padded=padded)
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(K, 1, heads, 1) * LOG2_E
        alibi_slopes = tiles(jnp.broadcast_to(slopes, (K, Q, heads, fold)).reshape(1, K, group, 1))[0, :, :, 0]
    config = config or default_config(tile, fold * H, k_pages.dtype, S * K)
    dtype = PRODUCT_DTYPES.get(k_pages.dtype, q.dtype)
    sizes = Sizes(
        S=S, K=K, H=fold * H, tile=tile, group=group, padded=padded, fold=fold, page_lines=page_size // fold,
        span=Span(config.block_keys * fold, Q, window), stages=config.stages, num_ctas=config.num_ctas,
        kv_dtype=k_pages.dtype, dtype=dtype, out_dtype=q.dtype, scale=scale, soft_cap=soft_cap,
        interpret=interpret,
    )  # fmt: skip
    columns = tiles(columns.reshape(S, K, group, fold * H).astype(dtype))
    options = dict(slopes=alibi_slopes, k_scales=k_scales, v_scales=v_scales)
    out, weight = _call(sizes, columns, k_pages, v_pages, page_table, kv_lens, options)
    if fold > 1:
        taken = (jnp.arange(K) * (0 if padded else group) % tile)[:, None] + jnp.arange(group)
        out = jnp.take_along_axis(out, taken[None, :, None, :], axis=3)
        out = _unfold(out, jnp.take_along_axis(weight, taken[None], axis=2), fold)
        in_use = kv_lens[:, None] > jnp.repeat(Q - 1 - jnp.arange(Q), heads)  # a query has a place in the row
        out = jnp.where(in_use[:, None, :, None], out, 0).astype(q.dtype)
    out = out[..., :H].reshape(S, K, Q, heads, H)
    return (out.swapaxes(1, 2) if Q > 1 else out).reshape(shape)


def _tile(K: int, group: int) -> tuple[int, bool]:
    """How many columns go to the tensor cores at once, a multiple of 8, and whether groups are padded to it.

    A tile of 8 may hold several groups: what the other groups' queries give is not looked at. Groups that fit no tile
    are padded.
    """
    tile = max(8, group)
    if tile % group or tile % 8 or K * group % tile:
        return group + -group % 8, True
    return tile, False


def _cut_into_tiles(columns, *, tile, padded):
    """[S, K, group, H] -> [S, tiles, tile, H]."""
    S, _, group, H = columns.shape
    if padded:
        columns = jnp.pad(columns, ((0, 0), (0, 0), (0, tile - group), (0, 0)))
    return columns.reshape(S, -1, tile, H)


def _unfold(out, weight, fold):
    """Joins what pseudo-queries found: [S, K, fold * H, group] and [S, K, group] -> [S, K, group / fold, H]."""
    S, K, width, group = out.shape
    weight = jax.nn.softmax(weight.reshape(S, K, group // fold, fold) / LOG2_E, axis=-1)
    out = out.reshape(S, K, fold, width // fold, group // fold, fold)
    return sum(out[:, :, i, :, :, i].swapaxes(2, 3) * weight[..., i, None] for i in range(fold))


def _call(sizes: Sizes, q, k_pages, v_pages, page_table, kv_lens, options):
    """The kernel.

    Args:
      q: [S, K * group / tile, tile, H], or [S, K, tile, H] where groups are padded.
      k_pages, v_pages: [P, K, page_lines, H], in q's dtype or of 8 bits.
      options: `slopes`, like q without S and H, float32, times log2(e); k_scales, v_scales; None for what is not there.

    Returns:
      [S, K, group, V] in sizes.out_dtype, of which the first H are the output; if fold > 1, float32 [S, K, H, tile].
      If fold > 1, float32 [S, K, tile], base-2 logarithms of the sums of exponentials; uninitialised for unused rows.
    """
    S, K, tile, G = sizes.S, sizes.K, sizes.tile, sizes.num_ctas
    schedule = cut(kv_lens, page_table, K, sizes.span, sizes.page_lines * sizes.fold, G)
    inputs = Inputs(q, k_pages, v_pages, page_table, kv_lens, *schedule, **options)._asdict()
    inputs = {name: x for name, x in inputs.items() if x is not None}
    out = ((S, K, sizes.group, sizes.V), sizes.out_dtype) if sizes.fold == 1 else ((S, K, sizes.H, tile), jnp.float32)
    return mosaic.kernel(
        functools.partial(kernel, sizes, tuple(inputs)),
        interpret=sizes.interpret,
        out_type=[
            jax.ShapeDtypeStruct(*out),
            jax.ShapeDtypeStruct((S, K, tile) if sizes.fold > 1 else (1, 1, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, sizes.V, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, tile), jnp.float32),
        ],
        scratch_types=scratch(sizes),
        grid=(G,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())[:2]
