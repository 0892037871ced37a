"""quant_matmul of up to 16 rows for Hopper: a kernel that begins to read at once and ends soon after.

Such a product takes as long as its weight takes to come from memory, and what a launch costs besides weighs as much: 4
bits a weight are 7 us of an H200's bandwidth where the matrix is 14336 x 4096, and 2 us where it is 4096 x 4096. So:

- A CTA has 64 rows of the weight, and its warpgroups share the columns. All CTAs run at once, and no work is dealt out.
- Words go from global memory to the registers of the threads that need them, for `weight` packed them so. There is
  nothing to set up first, and a multiprocessor's registers hold what must be under way: 4.3 TB/s for 1 us are 33 KB of
  each of 132; 512 threads with 32 words each have asked for 64 KB.
- Activations, in shared memory, come by copies of whole rows while the first words are under way.
- Products are those of single warps (mma, not wgmma): nothing is waited for but the operands, so that a warp's
  conversions and another's products overlap. A tile of 64 x 128 weights is about 130 instructions for each of its 4
  warps; 54 of these tiles on each multiprocessor's 4 schedulers are 4 us of the 7 us.
- Sums of the warpgroups meet in shared memory. Where a matrix has too few rows for all multiprocessors, several CTAs
  share the columns, and XLA adds their sums where the product is used.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.quant_matmul import unpack
from pallas_kernels.quant_matmul.unpack import along_columns
from pallas_kernels.quant_matmul.weight import KINDS, TILE_COLUMNS, TILE_ROWS, QuantizedWeight

MAX_ROWS = 16
SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
# A number for each row of the weight, with the threads that have the row's sums.
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
# Makes of a copy one of a line of bytes, which needs no description of the array, and may be long.
_IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
_COMPILERS = 6144  # bytes of shared memory that it takes or leaves between arrays, at most
_PAD = 8  # elements after a row of activations, which puts rows into different banks


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: of a CTA, which share its columns.
      split: CTAs that share a tile of 64 rows. Beyond one their sums are added by XLA.
      num_ctas: for each part of the columns; each has every so manyth tile of rows.
      stages: tiles of 128 columns that a warpgroup has asked for and not yet used.
    """

    warpgroups: int
    split: int
    num_ctas: int
    stages: int


def default_config(weight: QuantizedWeight, batch: int) -> Config | None:
    """A CTA on each multiprocessor, with 512 threads and 96 KB or half of it under way.

    None if that does not fit, or for more rows.
    """
    R, C = weight.codes.shape[:2]
    sms = mosaic.num_multiprocessors()
    warpgroups = min(4, C)
    split = max(1, min(sms // R, C // warpgroups))
    most = 48 // KINDS[weight.format].words
    while batch <= MAX_ROWS and split <= C // warpgroups:
        for stages in range(most, most // 2, -1):
            config = Config(warpgroups, split, min(R, sms // split), stages)
            if fits(weight, batch, config):
                return config
        split *= 2
    return None


def fits(weight: QuantizedWeight, batch: int, config: Config) -> bool:
    """Whether every warpgroup has a tile, and shared memory has room."""
    C = weight.codes.shape[1]
    if batch > MAX_ROWS or config.warpgroups * config.split > C:
        return False
    groups = 0 if weight.group_size == -1 else max(1, TILE_COLUMNS // weight.group_size)
    stage = KINDS[weight.format].words * 512 + groups * TILE_ROWS * (weight.scales.dtype.itemsize + 2)
    sums = 4 * (batch + -batch % 8) * TILE_ROWS
    x = 2 * batch * (-(-C // config.split) * TILE_COLUMNS + _PAD)
    return config.warpgroups * (config.stages * stage + sums) + x + _COMPILERS <= SHARED_MEMORY


class _Sizes(NamedTuple):
    """Static sizes of a call. `tiles` and `column_tiles` are the weight's, `groups` a tile's: 0 if a row has one scale."""

    config: Config
    format: str
    dtype: jnp.dtype
    tiles: int
    column_tiles: int
    groups: int
    has_zeros: bool
    batch: int
    interpret: bool

    @property
    def rows(self):
        """Of activations in a product: 8 or 16, the last of which are there for the tensor cores alone."""
        return self.batch + -self.batch % 8

    @property
    def window(self):
        """Tiles of columns whose activations a CTA has."""
        return -(-self.column_tiles // self.config.split)

    @property
    def shares(self):
        return self.config.split * self.config.warpgroups

    @property
    def span(self):
        """Columns that have a scale in common."""
        return TILE_COLUMNS // max(1, self.groups)


def multiply(x, weight: QuantizedWeight, *, out_dtype, config: Config, interpret: bool = False):
    """[batch, in] x [out, in] -> [batch, out]; columns of x in the order of the weight's codes."""
    batch = x.shape[0]
    tiles, column_tiles = weight.codes.shape[:2]
    if not fits(weight, batch, config):
        raise ValueError(f"{config} does not fit {batch} rows and a weight of {column_tiles} tiles of columns")
    x = jnp.pad(x, ((0, 0), (0, column_tiles * TILE_COLUMNS - x.shape[1])))
    groups = 0 if weight.group_size == -1 else max(1, TILE_COLUMNS // weight.group_size)
    sizes = _Sizes(
        config, weight.format, x.dtype, tiles, column_tiles, groups, weight.zeros is not None, batch, interpret
    )
    sums_dtype = out_dtype if config.split == 1 else jnp.float32
    out = mosaic.kernel(
        functools.partial(_kernel, sizes),
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((config.split, batch, tiles * TILE_ROWS), sums_dtype),
        scratch_types=_scratch(sizes, weight),
        grid=(config.num_ctas, config.split),
        grid_names=("cta", "part"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
    )(x, weight.codes, weight.scales, weight.scales if weight.zeros is None else weight.zeros)
    return out.sum(axis=0).astype(out_dtype)[:, : weight.out_features]


class _Shared(NamedTuple):
    """Shared memory of a CTA.

    x       activations of its columns
    codes, scales, zeros    by stage and warpgroup, a tile's
    sums    of all warpgroups but the last; `full` says that they are there, `empty` that they have been taken
    """

    x: object
    codes: object
    scales: object | None
    zeros: object | None
    sums: object | None
    x_full: object
    full: object | None
    empty: object | None


def _scratch(sizes, weight):
    config, others = sizes.config, sizes.config.warpgroups - 1
    stages = config.stages, config.warpgroups
    groups = (*stages, sizes.groups, TILE_ROWS)
    return _Shared(
        x=plgpu.SMEM((sizes.batch, sizes.window * TILE_COLUMNS + _PAD), sizes.dtype),
        codes=plgpu.SMEM((*stages, *weight.codes.shape[2:]), jnp.int32),
        scales=plgpu.SMEM(groups, weight.scales.dtype) if sizes.groups else None,
        zeros=plgpu.SMEM(groups, weight.zeros.dtype) if sizes.has_zeros else None,
        sums=plgpu.SMEM((others, TILE_ROWS, sizes.rows), jnp.float32) if others else None,
        x_full=plgpu.Barrier(num_arrivals=sizes.batch),
        full=plgpu.Barrier(num_arrivals=others) if others else None,
        empty=plgpu.Barrier() if others else None,
    )


def _kernel(sizes, x_ref, codes_ref, scales_ref, zeros_ref, out_ref, *scratch):
    config, shared = sizes.config, _Shared(*scratch)
    cta, part, warpgroup = lax.axis_index("cta"), lax.axis_index("part"), lax.axis_index("warpgroup")
    share = part * config.warpgroups + warpgroup
    first, stop = (lax.div(at * sizes.column_tiles, jnp.int32(sizes.shares)) for at in (share, share + 1))
    # The last CTA's window of the activations may begin before its first tile.
    window = jnp.minimum(lax.div(part * sizes.column_tiles, jnp.int32(config.split)), sizes.column_tiles - sizes.window)
    count = lax.div(sizes.tiles - 1 - cta, jnp.int32(config.num_ctas)) + 1

    def ask(slot, number, at):
        """Has the tile of columns `at` of the CTA's `number`-th tile of rows copied, and says which one comes next."""
        wanted = number < count
        tile = jnp.where(wanted, cta + number * config.num_ctas, 0)
        _copy(sizes, slot, warpgroup, wanted, at, codes_ref.at[tile], scales_ref.at[tile], zeros_ref.at[tile], shared)
        last = at + 1 == stop
        return jnp.where(last, number + 1, number), jnp.where(last, first, at + 1)

    def add_tile(at, state):
        acc, slot, ahead = state
        if not sizes.interpret:
            mosaic.wait_for_copies(but=config.stages - 1)
        loaded = _load(sizes, slot, warpgroup, shared)
        ahead = ask(slot, *ahead)
        columns = pl.ds((at - window) * TILE_COLUMNS, TILE_COLUMNS)
        acc = _add_tile(sizes, shared.x.at[:, columns], loaded, acc)
        return acc, jnp.where(slot + 1 == config.stages, 0, slot + 1), ahead

    def multiply_rows(number, state):
        acc, *state = lax.fori_loop(first, stop, add_tile, (_no_sums(sizes), *state))
        tile = cta + number * config.num_ctas
        out = out_ref.at[part, :, pl.ds(tile * TILE_ROWS, TILE_ROWS)]
        _finish(sizes, warpgroup, number, count, acc, scales_ref.at[tile], shared, out)
        return tuple(state)

    ahead = jnp.int32(0), first
    for slot in range(config.stages):
        ahead = ask(slot, *ahead)
    _copy_activations(sizes, warpgroup, window, x_ref, shared)
    lax.fori_loop(0, count, multiply_rows, (jnp.int32(0), ahead))


def _copy_activations(sizes, warpgroup, window, x_ref, shared):
    """Those of the CTA's columns."""

    @pl.when(warpgroup == 0)
    def _():
        columns = pl.ds(window * TILE_COLUMNS, sizes.window * TILE_COLUMNS)
        for row in range(sizes.batch):
            target = shared.x.at[row, pl.ds(0, sizes.window * TILE_COLUMNS)]
            plgpu.copy_gmem_to_smem(x_ref.at[row, columns], target, shared.x_full, oob_mode=_IN_BOUNDS)

    plgpu.barrier_wait(shared.x_full)


def _finish(sizes, warpgroup, number, count, acc, scales_ref, shared, out_ref):
    """Adds what the warpgroups have of a tile of rows, and writes it."""
    others = sizes.config.warpgroups - 1
    if others:

        @pl.when(warpgroup < others)
        def _():
            @pl.when(number > 0)
            def _():
                plgpu.barrier_wait(shared.empty)

            shared.sums[warpgroup] = acc
            plgpu.barrier_arrive(shared.full)

    @pl.when(warpgroup == others)
    def _():
        total = acc
        if others:
            plgpu.barrier_wait(shared.full)
            for other in range(others):
                total += plgpu.load(shared.sums.at[other], layout=plgpu.Layout.WGMMA, optimized=False)

            @pl.when(number + 1 < count)
            def _():
                plgpu.barrier_arrive(shared.empty)

        if not sizes.groups:
            total *= along_columns(_by_row(scales_ref.at[0]).astype(jnp.float32), total.shape)
        _store(sizes, total, out_ref)


def _by_row(ref):
    return plgpu.load(ref, layout=BY_ROW, optimized=False)


def _copy(sizes, slot, warpgroup, wanted, at, codes_ref, scales_ref, zeros_ref, shared):
    """Begins to copy a tile."""
    groups = pl.ds(at * sizes.groups, sizes.groups)
    own = [shared.codes.at[slot, warpgroup]]
    sources = [codes_ref.at[at]]
    if sizes.groups:
        own += [shared.scales.at[slot, warpgroup]]
        sources += [scales_ref.at[groups]]
    if sizes.has_zeros:
        own += [shared.zeros.at[slot, warpgroup]]
        sources += [zeros_ref.at[groups]]
    if not sizes.interpret:
        words, *rows = zip(sources, own, strict=True)
        mosaic.copy_by_warps(words, rows, wanted)
        return

    @pl.when(wanted)
    def _():
        for source, target in zip(sources, own, strict=True):
            target[...] = source[...]


def _load(sizes, slot, warpgroup, shared):
    """A tile's words, and a list of scales and of zeros of its groups, from shared memory."""
    words = unpack.load_words(shared.codes.at[slot, warpgroup])
    groups = range(sizes.groups)
    scales = [_by_row(shared.scales.at[slot, warpgroup, group]).astype(jnp.float32) for group in groups]
    if not sizes.has_zeros:
        return words, scales, None
    return words, scales, [_by_row(shared.zeros.at[slot, warpgroup, group]).astype(sizes.dtype) for group in groups]


def _add_tile(sizes, x, loaded, acc):
    """Adds the products of a tile to acc, float32 [64, rows]. `x`: [batch, 128] in shared memory."""
    words, scales, zeros = loaded
    arrays = unpack.values_of(words, sizes.format, sizes.dtype, sizes.span, zeros, sizes.interpret)
    for group, values in enumerate(arrays):
        columns = x.at[:, pl.ds(group * sizes.span, sizes.span)]
        if not scales:
            acc = _product(sizes, values, columns, acc)
            continue
        product = _product(sizes, values, columns, _no_sums(sizes))
        acc += product * along_columns(scales[group], acc.shape)
    return acc


def _product(sizes, values, x, acc):
    """acc + values x activations, which lie in shared memory."""
    if sizes.interpret:
        x = jnp.pad(x[...], ((0, sizes.rows - sizes.batch), (0, 0)))
        return acc + jnp.dot(values.astype(jnp.float32), x.astype(jnp.float32).T, precision="highest")
    return mosaic.add_product(acc, values, x)


def _store(sizes, sums, out_ref):
    if sizes.interpret:
        out_ref[...] = sums.T[: sizes.batch].astype(out_ref.dtype)
    else:
        mosaic.store_transposed(sums, out_ref)


def _no_sums(sizes):
    return plgpu.layout_cast(jnp.zeros((TILE_ROWS, sizes.rows), jnp.float32), plgpu.Layout.WGMMA)
