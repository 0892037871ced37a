"""quant_matmul of few rows for Hopper: a kernel that begins to read at once and ends soon after.

Such a product takes as long as its weight takes to come from memory, and what a launch costs besides weighs as much: 4
bits a weight are 7 us of an H200's bandwidth where the matrix is 14336 x 4096, and 2 us where it is 4096 x 4096. So:

- A CTA has 32 rows of the weight, or 16 or 64, and its warpgroups share the columns: one takes these rows of two tiles
  at once, or of four or one. So no CTA needs another's sums, and nothing is left for a second kernel; but where not
  even one stage fits beside the activations of a long row, CTAs share the columns (`split`) and XLA adds, in what uses
  the product.
- Each warp copies to shared memory the words that its own threads need (cp.async), for `weight` packed them so. It
  waits for nobody, there is nothing to set up first, and the first instructions ask for all that should be under way:
  4.3 TB/s for 1 us are 33 KB for each of 132 multiprocessors; it is 96 KB, for a CTA's first wait is its longest.
  CTAs with less to do than others cost little then: those that go on have enough under way for the whole bandwidth.
- Activations come with the words of the first 64 rows that they are multiplied with, and stay. All of them at once
  would be waited for: 16 rows of 4096 are 128 KB for each multiprocessor.
- Products are those of single warps (mma, not wgmma): nothing is waited for but the operands, so that a warp's
  conversions and another's products overlap. 64 x 128 weights of 4 bits are 110 instructions for each of 4 warps, 40
  of them to convert: codes are multiplied as they are, and a group's sum begins with what their zeros make of the
  activations. 54 such tiles on each multiprocessor, which issues 4 a cycle, are 3 us of the 7.
- The warpgroups' sums meet in shared memory, and one of these writes them.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import inline_ptx, mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.quant_matmul import unpack
from pallas_kernels.quant_matmul.unpack import along_columns
from pallas_kernels.quant_matmul.weight import KINDS, TILE_COLUMNS, TILE_ROWS, QuantizedWeight

MAX_ROWS = 16
# Unasked. With 16 rows the first version of this kernel took 31 us where the one for many rows takes 24 (int4, 14336 x
# 4096); up to 8 rows cost the tensor cores no more than one.
_MAX_DEFAULT_ROWS = 8
# A number for each row of the weight, with the threads that have the row's sums.
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_COMPILERS = 6144  # bytes of shared memory that it takes or leaves between arrays, at most
_PAD = 8  # elements after a row of activations, which puts rows into different banks


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      rows: of the weight, that a CTA takes at a time: 64, 32 or 16.
      warpgroups: of a CTA, which share its columns.
      split: CTAs that share the columns. Beyond one their sums are added by XLA.
      num_ctas: for each part of the columns; each takes every so manyth `rows`.
      stages: steps that a warpgroup has asked for and not yet done. A step is 64 x 128 weights: with 32 or 16 rows
        these are of 2 or 4 tiles.
    """

    rows: int
    warpgroups: int
    split: int
    num_ctas: int
    stages: int


def default_config(weight: QuantizedWeight, batch: int) -> Config | None:
    """A CTA on each multiprocessor or nearly so, with 512 threads and 96 KB or half of it under way.

    None if that does not fit, or for more than 8 rows. An H200 took 3 % less time with 32 rows of the weight at a time
    than with 64 (int4, 14336 x 4096), and with 16 another 6 % where not every multiprocessor had 32 (4096 x 4096).
    """
    if batch > _MAX_DEFAULT_ROWS:
        return None
    R, C = weight.codes.shape[:2]
    sms = mosaic.num_multiprocessors()
    idle = sms > 2 * R  # with 32 rows at a time
    rows = 64 if C % 2 else 16 if C % 4 == 0 and idle else 32
    units = R * 64 // rows
    most = 48 // KINDS[weight.format].words
    for split in (1, 2, 4, 8):
        for stages in range(most, most // 2, -1):
            each = -(-units // (sms // split))  # of a CTA, so that none has one less than it could have
            config = Config(rows, min(4, C * rows // 64 // split), split, -(-units // each), stages)
            if fits(weight, batch, config):
                return config
    return None


def fits(weight: QuantizedWeight, batch: int, config: Config) -> bool:
    """Whether every warpgroup has a step, and shared memory has room."""
    steps, rest = divmod(weight.codes.shape[1], 64 // config.rows)
    if batch > MAX_ROWS or rest or not 1 <= config.warpgroups * config.split <= steps:
        return False
    stage = KINDS[weight.format].words * 512 + _groups_in_tile(weight) * TILE_ROWS * (weight.scales.dtype.itemsize + 2)
    sums = 4 * (batch + -batch % 8) * TILE_ROWS
    tiles = -(-steps // config.split) * (64 // config.rows)
    x = 2 * batch * (tiles * TILE_COLUMNS + _PAD)
    if weight.format == "int4":
        x += tiles * _groups_in_tile(weight) * 8 * (batch + -batch % 8)
    return config.warpgroups * (config.stages * stage + sums) + x + _COMPILERS <= mosaic.SHARED_MEMORY


def _groups_in_tile(weight):
    return max(1, TILE_COLUMNS // weight.group_size) if weight.group_size > 0 else 1


class _Sizes(NamedTuple):
    """Static sizes of a call. `units`: of config.rows rows in the weight; `steps` of each; `groups`: of a tile."""

    config: Config
    format: str
    dtype: jnp.dtype
    units: int
    steps: int
    groups: int
    has_row_scales: bool
    has_zeros: bool
    batch: int
    interpret: bool

    @property
    def tile_batch(self):
        """Of activations in a product: 8 or 16, the last of which are there for the tensor cores alone."""
        return self.batch + -self.batch % 8

    @property
    def fold(self):
        """Tiles of a step, of each of which a warpgroup has so manyth part of the rows."""
        return TILE_ROWS // self.config.rows

    @property
    def window(self):
        """Steps whose activations a CTA has."""
        return -(-self.steps // self.config.split)

    @property
    def columns(self):
        """Of a step."""
        return self.fold * TILE_COLUMNS

    @property
    def span(self):
        """Columns that have a scale in common."""
        return TILE_COLUMNS // self.groups

    @property
    def x_zeros(self):
        """The shape of a step's `x_zeros`."""
        return self.groups, self.fold, 2 * self.tile_batch


def multiply(x, weight: QuantizedWeight, *, out_dtype, config: Config, interpret: bool = False):
    """[batch, in] x [out, in] -> [batch, out]; columns of x in the order of the weight's codes.

    With int4 and bfloat16, activations of 2^67 and more become infinite (see unpack.ACTIVATION_FACTOR).
    """
    batch = x.shape[0]
    R, C = weight.codes.shape[:2]
    if not fits(weight, batch, config):
        raise ValueError(f"{config} does not fit {batch} rows and a weight of {C} tiles of columns")
    x = jnp.pad(x, ((0, 0), (0, C * TILE_COLUMNS - x.shape[1])))
    groups, fold, has_row_scales = _groups_in_tile(weight), TILE_ROWS // config.rows, weight.group_size == -1
    by_tile = (R, 1 if has_row_scales else C, groups, TILE_ROWS)
    scales = weight.scales.reshape(by_tile)
    zeros = scales if weight.zeros is None else weight.zeros.reshape(by_tile)
    sizes = _Sizes(
        config=config, format=weight.format, dtype=x.dtype, units=R * fold, steps=C // fold, groups=groups,
        has_row_scales=has_row_scales, has_zeros=weight.zeros is not None, batch=batch, interpret=interpret,
    )  # fmt: skip
    out = mosaic.kernel(
        functools.partial(_kernel, sizes),
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct(
            (config.split, batch, R * TILE_ROWS), out_dtype if config.split == 1 else jnp.float32
        ),
        scratch_types=_scratch(sizes, weight),
        grid=(config.num_ctas, config.split),
        grid_names=("cta", "part"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
    )(x, weight.codes, scales, zeros)
    return out.sum(axis=0).astype(out_dtype)[:, : weight.out_features]


class _Shared(NamedTuple):
    """Shared memory of a CTA.

    x       activations of its columns
    x_zeros     what codes of -8, or of -1 if there are zeros, make of them: by step, group and tile; of int4 alone
    codes, scales, zeros    by stage and warpgroup, a step's
    sums    of the warpgroups; `full` says that they are there, `empty` that they have been taken
    """

    x: object
    x_zeros: object | None
    codes: object
    scales: object
    zeros: object | None
    sums: object
    full: object
    empty: object


def _scratch(sizes, weight):
    config = sizes.config
    stages = config.stages, config.warpgroups
    groups = (*stages, sizes.groups, TILE_ROWS)
    return _Shared(
        x=plgpu.SMEM((sizes.batch, sizes.window * sizes.columns + _PAD), sizes.dtype),
        x_zeros=plgpu.SMEM((sizes.window, *sizes.x_zeros), jnp.float32) if sizes.format == "int4" else None,
        codes=plgpu.SMEM((*stages, *weight.codes.shape[2:]), jnp.int32),
        scales=plgpu.SMEM(groups, weight.scales.dtype),
        zeros=plgpu.SMEM(groups, weight.zeros.dtype) if sizes.has_zeros else None,
        sums=plgpu.SMEM((config.warpgroups, TILE_ROWS, sizes.tile_batch), jnp.float32),
        full=plgpu.Barrier(num_arrivals=config.warpgroups),
        empty=plgpu.Barrier(),
    )


def _kernel(sizes, x_ref, codes_ref, scales_ref, zeros_ref, out_ref, *scratch):
    config, shared = sizes.config, _Shared(*scratch)
    cta, part, warpgroup = lax.axis_index("cta"), lax.axis_index("part"), lax.axis_index("warpgroup")
    share, shares = part * config.warpgroups + warpgroup, jnp.int32(config.split * config.warpgroups)
    first, stop = (lax.div(at * sizes.steps, shares) for at in (share, share + 1))
    # The last CTA's window of the activations may begin before its first step.
    window = jnp.minimum(lax.div(part * sizes.steps, jnp.int32(config.split)), sizes.steps - sizes.window)
    count = lax.div(sizes.units - 1 - cta, jnp.int32(config.num_ctas)) + 1

    def x_of(step):
        return shared.x.at[:, pl.ds((step - window) * sizes.columns, sizes.columns)]

    def ask(slot, number, step, with_x):
        """Has a step of the CTA's `number`-th unit copied, and says which one comes next."""
        if with_x:
            columns = pl.ds(step * sizes.columns, sizes.columns)
            _copy_activations(sizes, number == 0, x_ref.at[:, columns], x_of(step))
        wanted = number < count
        unit = jnp.where(wanted, cta + number * config.num_ctas, 0)
        _copy(sizes, slot, warpgroup, wanted, unit, step, codes_ref, scales_ref, zeros_ref, shared)
        last = step + 1 == stop
        return jnp.where(last, number + 1, number), jnp.where(last, first, step + 1)

    def add_step(step, state, with_x):
        acc, slot, ahead = state
        if not sizes.interpret:
            inline_ptx.wait_for_copies(but=config.stages - 1)
            if with_x:
                if sizes.format == "int4" and (factor := unpack.ACTIVATION_FACTOR[sizes.dtype.name]) != 1:
                    inline_ptx.scale_copied(x_of(step), factor)
                inline_ptx.wait_for_warpgroup()
        loaded = _load(sizes, slot, warpgroup, shared)
        ahead = ask(slot, *ahead, with_x)
        x_zeros = shared.x_zeros.at[step - window] if sizes.format == "int4" else None
        if sizes.format == "int4" and with_x:
            _multiply_zeros(sizes, x_of(step), x_zeros)
        acc = _add_step(sizes, x_of(step), x_zeros, loaded, acc)
        return acc, jnp.where(slot + 1 == config.stages, 0, slot + 1), ahead

    def multiply_unit(number, state, with_x=False):
        add = functools.partial(add_step, with_x=with_x)
        acc, *state = lax.fori_loop(first, stop, add, (_no_sums(sizes), *state))
        rows = pl.ds((cta + number * config.num_ctas) * config.rows, config.rows)
        _store(sizes, warpgroup, number, count, acc, shared, out_ref.at[part, :, rows])
        return tuple(state)

    ahead = jnp.int32(0), first
    for slot in range(config.stages):
        ahead = ask(slot, *ahead, with_x=True)
    # Activations stay, and come step by step with the first unit's words.
    state = multiply_unit(jnp.int32(0), (jnp.int32(0), ahead), with_x=True)
    lax.fori_loop(1, count, multiply_unit, state)


def _copy_activations(sizes, wanted, source, target):
    """Begins to copy those of a step."""
    if not sizes.interpret:
        inline_ptx.copy_by_warpgroup(source, target, wanted)
        return

    @pl.when(wanted)
    def _():
        target[...] = source[...]


def _copy(sizes, slot, warpgroup, wanted, unit, step, codes_ref, scales_ref, zeros_ref, shared):
    """Begins to copy what a step needs."""
    tile, part = lax.div(unit, jnp.int32(sizes.fold)), lax.rem(unit, jnp.int32(sizes.fold))
    tiles = pl.ds(step * sizes.fold, sizes.fold)
    words = codes_ref.at[tile, tiles], shared.codes.at[slot, warpgroup]
    lines = [(scales_ref.at[tile, pl.ds(0, 1) if sizes.has_row_scales else tiles], shared.scales.at[slot, warpgroup])]
    if sizes.has_zeros:
        lines.append((zeros_ref.at[tile, tiles], shared.zeros.at[slot, warpgroup]))
    if not sizes.interpret:
        inline_ptx.copy_by_warps(words, lines, part, wanted)
        return

    @pl.when(wanted)
    def _():
        for warp in range(4):
            tile, strip = divmod(warp, 4 // sizes.fold)
            strip += part * (4 // sizes.fold)
            source, target = words
            for line in range(0, target.shape[0], 4):
                target[line + warp] = source[tile, line + strip]
            for source, target in lines:
                of_strip = pl.ds(strip * 16, 16)
                target[:, pl.ds(warp * 16, 16)] = source[0 if sizes.has_row_scales else tile, :, of_strip]


def _load(sizes, slot, warpgroup, shared):
    """A step's words, and a list of scales and of zeros of its groups, from shared memory."""
    words = unpack.load_words(shared.codes.at[slot, warpgroup])
    groups = range(sizes.groups)
    scales = [_by_row(shared.scales.at[slot, warpgroup, group]).astype(jnp.float32) for group in groups]
    if sizes.format == "int4":
        scales = [unpack.scale_nibbles(scale, sizes.dtype, sizes.interpret) for scale in scales]
    else:
        scales = [scale * (1 / unpack.unit(sizes.format, sizes.dtype, sizes.interpret)) for scale in scales]
    if not sizes.has_zeros:
        return words, scales, None
    return words, scales, [_by_row(shared.zeros.at[slot, warpgroup, group]).astype(jnp.float32) for group in groups]


def _by_row(ref):
    return plgpu.load(ref, layout=BY_ROW, optimized=False)


def _multiply_zeros(sizes, x, x_zeros):
    """Keeps the products of a step's activations and the negative zero, or -1, where each thread will look for them."""
    code = unpack.minus_nibble(1 if sizes.has_zeros else 8, sizes.span, sizes.dtype, sizes.interpret)
    for group in range(sizes.groups):
        product = _product(sizes, code, x, group * sizes.span, _no_sums(sizes))
        if sizes.interpret:
            of_tile = product.reshape(sizes.fold, -1, sizes.tile_batch)[:, 0]
            x_zeros[group] = jnp.concatenate([of_tile, of_tile], axis=1)
        else:
            inline_ptx.store_by_column(product, x_zeros.at[group])


def _zeros_of(sizes, x_zeros, zeros, group):
    """What a group's sums begin with."""
    if sizes.interpret:
        of_tile = x_zeros[group][:, : sizes.tile_batch]
        begin = jnp.repeat(of_tile, sizes.config.rows, axis=0)
    else:
        begin = inline_ptx.load_by_column(x_zeros.at[group], sizes.tile_batch)
    return begin if zeros is None else begin * along_columns(zeros[group], begin.shape)


def _add_step(sizes, x, x_zeros, loaded, acc):
    """Adds the products of a step to acc, float32 [64, tile_batch]. `x`: its activations in shared memory."""
    words, scales, zeros = loaded
    if sizes.format == "int4":
        arrays = unpack.nibbles_of(words, sizes.dtype, sizes.span, sizes.interpret)
        begins = [_zeros_of(sizes, x_zeros, zeros, group) for group in range(sizes.groups)]
    else:
        arrays = unpack.values_of(words, sizes.format, sizes.dtype, sizes.span, None, sizes.interpret)
        begins = [_no_sums(sizes)] * sizes.groups
    for group, (values, begin) in enumerate(zip(arrays, begins, strict=True)):
        product = _product(sizes, values, x, group * sizes.span, begin)
        acc += product * along_columns(scales[group], acc.shape)
    return acc


def _product(sizes, values, x, column, begin):
    """begin + values x activations. Parts of the rows are of different tiles, and so have other columns of these."""
    if not sizes.interpret:
        return inline_ptx.add_product(begin, values, x, column, sizes.fold)
    parts = []
    for part, values_of_part in enumerate(jnp.split(values.astype(jnp.float32), sizes.fold)):
        columns = x[:, pl.ds(part * TILE_COLUMNS + column, sizes.span)].astype(jnp.float32)
        parts.append(jnp.dot(values_of_part, columns.T, precision="highest"))
    return begin + jnp.pad(jnp.concatenate(parts), ((0, 0), (0, sizes.tile_batch - sizes.batch)))


def _no_sums(sizes):
    return plgpu.layout_cast(jnp.zeros((TILE_ROWS, sizes.tile_batch), jnp.float32), plgpu.Layout.WGMMA)


def _store(sizes, warpgroup, number, count, acc, shared, out_ref):
    """Adds what the warpgroups have of a unit, and writes it."""

    @pl.when(number > 0)
    def _():
        plgpu.barrier_wait(shared.empty)

    shared.sums[warpgroup] = acc
    plgpu.barrier_arrive(shared.full)

    @pl.when(warpgroup == sizes.config.warpgroups - 1)
    def _():
        plgpu.barrier_wait(shared.full)
        if sizes.interpret:
            sums = shared.sums[...].reshape(-1, sizes.config.rows, sizes.tile_batch).sum(axis=0)
            out_ref[...] = sums.T[: sizes.batch].astype(out_ref.dtype)
        else:
            inline_ptx.store_sums(shared.sums, out_ref)

        @pl.when(number + 1 < count)
        def _():
            plgpu.barrier_arrive(shared.empty)
