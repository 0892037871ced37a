"""quant_matmul for Hopper in Pallas Mosaic GPU.

The product is computed transposed, weight x activations, for wgmma wants 64 rows and a batch may have one. The weight
is its left operand and goes there from registers, where a thread has turned the words that `weight` packed for it into
values of 16 bits. A group's products are summed apart and scaled in float32, so codes are multiplied as the integers
that they are. Activations of the batch lie in shared memory. Where these are quantized too, words go to wgmma as they
are, and the activations' columns are reordered to match.

The matrix is cut into *blocks* of 64 rows for each of the warpgroups that compute, and these into *steps* of 128
columns. All steps, ordered by block and then column, are dealt out in equal shares to a fixed number of CTAs
("Stream-K", Osama et al., 2023). Who has a part of a block is known beforehand, so no CTA waits for another: a block's
parts lie in as many *slots* of the output, in float32, and XLA adds these where the product is used, in a kernel that
is there anyway. In a CTA one more warpgroup copies to shared memory and runs ahead.

A batch beyond `tile_batch` rows is cut into tiles as well; CTAs of the same share and different tiles run side by side,
so that a weight comes from memory once. Beyond `max_batch` the weight is dequantized by XLA and multiplied as a whole.
Up to 8 rows that are not quantized are another kernel's, `few_rows`.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import inline_ptx, mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.quant_matmul import few_rows, reference, unpack
from pallas_kernels.quant_matmul.unpack import along_columns
from pallas_kernels.quant_matmul.weight import KINDS, TILE_COLUMNS, TILE_ROWS, QuantizedWeight

# A number for each row of the weight, or of the batch: where a sum over a WGMMA-shaped array leaves it.
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: that compute, 2 to 4; each has 64 rows of the weight.
      stages: steps under way in a CTA.
      num_ctas: shares that the weight is cut into, for each tile of the batch.
      tile_batch: rows of activations that a CTA takes at most, a multiple of 8.
      split: whether a share may begin and end within a block.
      max_batch: beyond it XLA multiplies the dequantized weight.
    """

    warpgroups: int
    stages: int
    num_ctas: int
    tile_batch: int = 128
    split: bool = True
    max_batch: int = 256


# A thread's registers, by warpgroups that compute. A CTA starts with 168, 128 or 96 for each thread of 3, 4 or 5
# warpgroups and never gets more in all: were more asked for, the increase would wait for ever.
_REGISTERS = {2: 232, 3: 152, 4: 104}
_REGISTERS_COPYING = 40


def default_config(weight: QuantizedWeight, batch: int) -> Config:
    """One CTA on a multiprocessor, with as many stages as shared memory has room for."""
    R, C = weight.codes.shape[:2]
    sms = mosaic.num_multiprocessors()
    tile_batch = min(128, batch + -batch % 8)
    ctas = sms // -(-batch // tile_batch)
    # Parts of blocks lie in slots, which are written and read in float32. Whole blocks have none, but leave
    # multiprocessors idle, at most for a fifth of the time here, and int4 of few rows needs them all to convert.
    blocks = -(-R // 2)
    split = blocks < 0.8 * ctas * -(-blocks // ctas) or (weight.format == "int4" and batch <= 32)
    # Registers decide: a thread has tile_batch / 2 sums, twice, and 32 for a tile of the weight.
    warpgroups = 4 if tile_batch <= 16 else 3 if tile_batch <= 32 else 2
    if not split or R * C / sms < 8:  # more parts
        warpgroups = 2
    blocks = -(-R // warpgroups)
    num_ctas = max(1, min(ctas, blocks * C if split else blocks))
    return with_stages(weight, Config(warpgroups, 0, num_ctas, tile_batch, split))


def with_stages(weight: QuantizedWeight, config: Config) -> Config:
    """The configuration with as many stages as shared memory has room for."""
    free = mosaic.SHARED_MEMORY - _shared_bytes(config)
    return replace(config, stages=min(free // _stage_bytes(weight, config), 12))


def fits(weight: QuantizedWeight, config: Config) -> bool:
    """Whether shared memory and registers have room."""
    sums = config.tile_batch // 2 * (1 if weight.group_size == -1 else 2)
    return config.stages >= 2 and sums + 64 <= _REGISTERS[config.warpgroups]


def _stage_bytes(weight, config):
    """Of codes, activations, scales and zeros of a step, and their barriers."""
    tile = KINDS[weight.format].words * 512 + 64 * _groups_in_tile(weight) * 8
    return config.warpgroups * tile + 2 * TILE_COLUMNS * config.tile_batch + 16


def _shared_bytes(config):
    """Of the output of a block, and the compiler's own."""
    return 2 * config.warpgroups * TILE_ROWS * config.tile_batch + 4096


def _groups_in_tile(weight):
    """How many scales a row has in a tile; 0 if the whole row has one."""
    return 0 if weight.group_size == -1 else max(1, TILE_COLUMNS // weight.group_size)


def supported(x, weight, *, activation, out_dtype, interpret=False) -> str | None:
    """Why the kernel cannot take the call, or None."""
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x {x.dtype}, one of bfloat16 and float16 is needed"
    if out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"out_dtype {out_dtype}, one of bfloat16, float16 and float32 is needed"
    if activation is not None and weight.group_size == 16:
        return f"activation {activation!r} with group_size 16, 32 is the least"
    if weight.zeros is not None and (weight.format != "int4" or weight.zeros.dtype != jnp.bfloat16):
        return f"{weight.format} with zeros {weight.zeros.dtype}, only int4 with integers is possible"
    if weight.zeros is not None and weight.group_size == -1:
        return "zeros with group_size -1"
    return None


@functools.partial(jax.jit, static_argnames=("activation", "out_dtype", "config", "interpret"))
def quant_matmul(
    x,
    weight: QuantizedWeight,
    *,
    activation,
    out_dtype,
    config: Config | few_rows.Config | None = None,
    interpret: bool = False,
):
    """See pallas_kernels.quant_matmul."""
    *batch_shape, in_features = x.shape
    x = x.reshape(-1, in_features)
    batch = x.shape[0]
    if config is None and activation is None:
        config = few_rows.default_config(weight, batch)
    config = config or default_config(weight, batch)
    if isinstance(config, Config) and batch > config.max_batch and activation is None:
        out = reference.quant_matmul(x, weight, activation=None, out_dtype=out_dtype)
        return out.reshape(*batch_shape, weight.out_features)
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    if isinstance(config, few_rows.Config):
        out = few_rows.multiply(x, weight, out_dtype=out_dtype, config=config, interpret=interpret)
        return out.reshape(*batch_shape, weight.out_features)
    x_scales = jnp.ones((1, batch), jnp.float32)
    if activation is not None:
        x, x_scales = _quantize(x, weight, activation)
    out = _multiply(x, x_scales, weight, out_dtype, config, interpret)
    return out.reshape(*batch_shape, weight.out_features)


def _quantize(x, weight, activation):
    """Codes [batch, columns], each 16 in the order in which a thread has the weight's; scales [1 or tiles, batch]."""
    dtype = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}[activation]
    codes, scales = reference.quantize_rows(x, dtype, reference.activation_group(weight))
    codes = codes.reshape(x.shape[0], -1)
    codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 16)))
    # A thread's word has the columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9; wgmma takes it for 4 q to 4 q + 3.
    parts = codes.reshape(x.shape[0], -1, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    return parts.reshape(codes.shape), scales.reshape(x.shape[0], -1).T


class _Sizes(NamedTuple):
    """Static sizes of a call, beside its config. `blocks` and `steps` are those of the whole weight and of a block."""

    config: Config
    format: str
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    tiles: int
    blocks: int
    steps: int
    groups: int
    has_zeros: bool
    batch: int
    tile_batch: int
    batch_tiles: int
    interpret: bool

    @property
    def span(self):
        """Columns that are multiplied at once."""
        return TILE_COLUMNS // max(1, self.groups)

    @property
    def quantized(self):
        """Whether activations are quantized too."""
        return jnp.dtype(self.dtype).itemsize == 1


def _sizes(x, weight, out_dtype, config, interpret):
    tiles, column_tiles = weight.codes.shape[:2]
    batch = x.shape[0]
    tile_batch = min(config.tile_batch, batch + -batch % 8)
    return _Sizes(
        config=config, format=weight.format, dtype=x.dtype, out_dtype=out_dtype, tiles=tiles,
        blocks=-(-tiles // config.warpgroups), steps=column_tiles, groups=_groups_in_tile(weight),
        has_zeros=weight.zeros is not None, batch=batch, tile_batch=tile_batch, batch_tiles=-(-batch // tile_batch),
        interpret=interpret,
    )  # fmt: skip


def _multiply(x, x_scales, weight, out_dtype, config, interpret):
    """[batch, in] -> [batch, out]."""
    sizes = _sizes(x, weight, out_dtype, config, interpret)
    tiles, column_tiles = weight.codes.shape[:2]
    more_rows = sizes.batch_tiles * sizes.tile_batch - sizes.batch
    x = jnp.pad(x, ((0, more_rows), (0, column_tiles * TILE_COLUMNS - x.shape[1])))
    x_scales = jnp.pad(x_scales, ((0, 0), (0, more_rows)))
    shares = _Shares(sizes)
    shape = sizes.batch if sizes.batch_tiles == 1 else x.shape[0], tiles * TILE_ROWS
    if shares.in_slots:
        out_type = jax.ShapeDtypeStruct((shares.num_slots, *shape), jnp.float32)
    else:
        out_type = jax.ShapeDtypeStruct(shape, out_dtype)
    out = mosaic.kernel(
        functools.partial(_kernel, sizes),
        interpret=interpret,
        out_type=out_type,
        scratch_types=_scratch(sizes, weight),
        grid=(config.num_ctas * sizes.batch_tiles,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, x_scales, weight.codes, weight.scales, weight.scales if weight.zeros is None else weight.zeros)
    if shares.in_slots:
        out = _add_slots(out, shares.slots_of_block, config).astype(out_dtype)
    return out[: sizes.batch, : weight.out_features]


def _add_slots(slots, slots_of_block, config):
    """[slots, batch, out] -> [batch, out]."""
    total, rows = slots[0], slots.shape[2]
    for i in range(1, len(slots)):
        in_use = np.repeat(slots_of_block > i, config.warpgroups * TILE_ROWS)[:rows]
        total += jnp.where(in_use, slots[i], 0)
    return total


class _Shared(NamedTuple):
    """Shared memory of a CTA; the first index is the stage, the second the warpgroup where each has its own."""

    x: object
    codes: object
    scales: object | None
    zeros: object | None
    values: object | None  # interpret mode alone
    out: object | None
    full: object
    empty: object


def _scratch(sizes, weight):
    config = sizes.config
    warpgroups, stages = config.warpgroups, config.stages
    itemsize = jnp.dtype(sizes.dtype).itemsize
    line = min(128 // itemsize, sizes.span)
    swizzled = (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line * itemsize))
    grouped = (stages, warpgroups, sizes.groups, TILE_ROWS)
    copies = 1 + warpgroups * (1 + (sizes.groups > 0) + sizes.has_zeros)
    return _Shared(
        x=plgpu.SMEM((stages, sizes.tile_batch, TILE_COLUMNS), sizes.dtype, transforms=swizzled),
        codes=plgpu.SMEM((stages, warpgroups, *weight.codes.shape[2:]), jnp.int32),
        scales=plgpu.SMEM(grouped, weight.scales.dtype) if sizes.groups else None,
        zeros=plgpu.SMEM(grouped, jnp.bfloat16) if sizes.has_zeros else None,
        values=plgpu.SMEM((warpgroups, TILE_ROWS, sizes.span), sizes.dtype, transforms=swizzled)
        if sizes.interpret
        else None,
        out=None if _Shares(sizes).in_slots else plgpu.SMEM((warpgroups, sizes.tile_batch, TILE_ROWS), sizes.out_dtype),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


class _Shares:
    """Which steps a CTA has: all of a weight's, in order, in equal parts.

    Attributes:
      slots_of_block: into how many parts each block falls; num_slots: the largest.
      in_slots: whether the output is in slots, or else the product as it is.
    """

    def __init__(self, sizes):
        self.steps = sizes.steps
        self.unit = 1 if sizes.config.split else sizes.steps
        self.each, self.rest = divmod(sizes.blocks * sizes.steps // self.unit, sizes.config.num_ctas)
        index = np.arange(sizes.config.num_ctas)
        firsts = (index * self.each + np.minimum(index, self.rest)) * self.unit
        block = np.arange(sizes.blocks)
        first, last = (
            np.searchsorted(firsts, at, "right") for at in (block * self.steps, (block + 1) * self.steps - 1)
        )
        self.slots_of_block = last - first + 1
        self.num_slots = int(self.slots_of_block.max())
        self.in_slots = self.num_slots > 1 or sizes.out_dtype == jnp.float32

    def first_and_count(self, index):
        """Of the steps of share `index`."""
        first = index * self.each + jnp.minimum(index, self.rest)
        return first * self.unit, (self.each + jnp.where(index < self.rest, 1, 0)) * self.unit

    def owner(self, step):
        """The share that has that step."""
        at = lax.div(step, jnp.int32(self.unit))
        in_rest = self.rest * (self.each + 1)
        after = self.rest + lax.div(at - in_rest, jnp.int32(max(self.each, 1)))
        return jnp.where(at < in_rest, lax.div(at, jnp.int32(self.each + 1)), after)


def _kernel(sizes, x_ref, x_scales_ref, codes_ref, scales_ref, zeros_ref, out_ref, *scratch):
    shared = _Shared(*scratch)
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    consumers = sizes.config.warpgroups
    batch_tile = lax.rem(cta, jnp.int32(sizes.batch_tiles))
    index = lax.div(cta, jnp.int32(sizes.batch_tiles))

    @pl.when(warpgroup == consumers)
    def _():
        plgpu.set_max_registers(_REGISTERS_COPYING, action="decrease")
        _copy(sizes, index, batch_tile, x_ref, codes_ref, scales_ref, zeros_ref, shared)

    @pl.when(warpgroup < consumers)
    def _():
        plgpu.set_max_registers(_REGISTERS[consumers], action="increase")
        _compute(sizes, index, batch_tile, warpgroup, x_scales_ref, scales_ref, out_ref, shared)


def _copy(sizes, index, batch_tile, x_ref, codes_ref, scales_ref, zeros_ref, shared):
    """Brings the steps of the share, one after the other, as stages become free."""
    config = sizes.config
    first, count = _Shares(sizes).first_and_count(index)

    def copy(i, _):
        slot = lax.rem(i, jnp.int32(config.stages))
        step = first + i
        block, k = lax.div(step, jnp.int32(sizes.steps)), lax.rem(step, jnp.int32(sizes.steps))

        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(shared.empty.at[slot])

        full = shared.full.at[slot]
        for w in range(config.warpgroups):
            # A last block may lack tiles: the last one again, and what comes of it is not stored.
            tile = jnp.minimum(block * config.warpgroups + w, sizes.tiles - 1)
            plgpu.copy_gmem_to_smem(codes_ref.at[tile, k], shared.codes.at[slot, w], full)
            if sizes.groups:
                at = pl.ds(k * sizes.groups, sizes.groups)
                plgpu.copy_gmem_to_smem(scales_ref.at[tile, at], shared.scales.at[slot, w], full)
                if sizes.has_zeros:
                    plgpu.copy_gmem_to_smem(zeros_ref.at[tile, at], shared.zeros.at[slot, w], full)
        rows, columns = pl.ds(batch_tile * sizes.tile_batch, sizes.tile_batch), pl.ds(k * TILE_COLUMNS, TILE_COLUMNS)
        plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], shared.x.at[slot], full)

    lax.fori_loop(0, count, copy, None)


def _compute(sizes, index, batch_tile, warpgroup, x_scales_ref, scales_ref, out_ref, shared):
    """A warpgroup's rows of every block that the share has a part of."""
    shares = _Shares(sizes)
    first, count = shares.first_and_count(index)
    batch = pl.ds(batch_tile * sizes.tile_batch, sizes.tile_batch)
    out_rows = pl.ds(0, sizes.batch) if sizes.batch_tiles == 1 else batch

    def x_scales_of(tile):
        scales = plgpu.load(x_scales_ref.at[tile, batch], layout=BY_COLUMN, optimized=False)
        return lax.broadcast_in_dim(scales, (TILE_ROWS, sizes.tile_batch), [1])

    def part_of_block(i):
        block, k = lax.div(first + i, jnp.int32(sizes.steps)), lax.rem(first + i, jnp.int32(sizes.steps))
        stop = jnp.minimum(i + sizes.steps - k, count)
        acc = plgpu.layout_cast(jnp.zeros((TILE_ROWS, sizes.tile_batch), jnp.float32), plgpu.Layout.WGMMA)
        add_step = functools.partial(_add_step, sizes, warpgroup, shared, count, x_scales_of, i - k)
        acc = lax.fori_loop(i, stop, add_step, acc)
        tile = block * sizes.config.warpgroups + warpgroup

        @pl.when(tile < sizes.tiles)
        def _():
            products = acc
            if not sizes.groups:
                scales = _scales(sizes, scales_ref.at[tile, 0])
                products *= along_columns(scales, acc.shape)
                if sizes.quantized:
                    products *= x_scales_of(0)
            columns = pl.ds(tile * TILE_ROWS, TILE_ROWS)
            if shares.in_slots:
                slot = index - shares.owner(block * sizes.steps)
                _store_part(sizes, products, out_ref.at[slot, out_rows, columns])
            else:
                _store(products, out_ref.at[out_rows, columns], shared.out.at[warpgroup])

        return stop

    lax.while_loop(lambda i: i < count, part_of_block, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _add_step(sizes, warpgroup, shared, count, x_scales_of, block_start, i, acc):
    """Adds the products of a step to acc, float32 [64, tile_batch]. The block starts with step block_start."""
    stages = sizes.config.stages
    slot = lax.rem(i, jnp.int32(stages))
    x_scales = None
    if sizes.quantized and sizes.groups:  # asked for before the wait
        x_scales = x_scales_of(i - block_start)
    plgpu.barrier_wait(shared.full.at[slot])
    for group, values in enumerate(_values(sizes, shared, slot, warpgroup)):
        activations = shared.x.at[slot, :, pl.ds(group * sizes.span, sizes.span)].T
        if not sizes.groups and not sizes.quantized:
            acc = _product(sizes, values, activations, warpgroup, shared, acc)
            continue
        # Sums of fp8 products have few bits in the tensor cores: no more than a tile's are left to them.
        scales = _scales(sizes, shared.scales.at[slot, warpgroup, group]) if sizes.groups else None
        product = _product(sizes, values, activations, warpgroup, shared).astype(jnp.float32)
        if scales is not None:
            product *= along_columns(scales, acc.shape)
        acc += product if x_scales is None else product * x_scales

    @pl.when(i + stages < count)
    def _():
        plgpu.barrier_arrive(shared.empty.at[slot])

    return acc


def _values(sizes, shared, slot, warpgroup):
    """Of a step: arrays [64, span]."""
    words = unpack.load_words(shared.codes.at[slot, warpgroup])
    if sizes.quantized:
        return unpack.codes_of(words, sizes.format, sizes.dtype, sizes.span, sizes.interpret)
    zeros = None
    if sizes.has_zeros:
        groups = range(sizes.groups)
        zeros = [_by_row(shared.zeros.at[slot, warpgroup, group]).astype(sizes.dtype) for group in groups]
    return unpack.values_of(words, sizes.format, sizes.dtype, sizes.span, zeros, sizes.interpret)


def _scales(sizes, ref):
    unit = 1.0 if sizes.quantized else unpack.unit(sizes.format, sizes.dtype, sizes.interpret)
    return _by_row(ref).astype(jnp.float32) * (1 / unit)


def _by_row(ref):
    return plgpu.load(ref, layout=BY_ROW, optimized=False)


def _product(sizes, values, activations, warpgroup, shared, acc=None):
    """values x activations, added to acc if there is one."""
    shape = TILE_ROWS, sizes.tile_batch
    dtype = jnp.int32 if sizes.dtype == jnp.int8 else jnp.float32
    if sizes.interpret:  # knows no wgmma of registers, and no run_state
        shared.values[warpgroup] = values
        plgpu.commit_smem()

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, shared.values.at[warpgroup], activations)
            return acc_ref[...]

        product = pl.run_scoped(multiply, plgpu.ACC(shape, dtype))
        return product if acc is None else acc + product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, values, activations)
        return acc_ref[...]

    def add(acc_ref):
        plgpu.wgmma(acc_ref, values, activations)

    if acc is None:
        return pl.run_scoped(multiply, plgpu.ACC(shape, dtype))
    return pl.run_state(add)(plgpu.ACC.init(acc))


def _store(products, out_ref, out_smem):
    """Writes the products of 64 rows, transposed."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem.T[...] = products.astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, out_ref.shape[0])], out_ref)


def _store_part(sizes, products, out_ref):
    """The same in float32, which Mosaic cannot transpose in shared memory."""
    if sizes.interpret:
        out_ref[...] = products.T[: out_ref.shape[0]]
    else:
        inline_ptx.store_transposed(products, out_ref)
