"""quant_matmul for Hopper in Pallas Mosaic GPU.

The product is computed transposed, weight x activations, for wgmma wants 64 rows and a batch may have one. The weight
is its left operand and goes there from registers, where a thread has turned the words that `weight` packed for it into
values of 16 bits. A group's products are summed apart and scaled in float32, so codes are multiplied as the integers
that they are. Activations of the batch lie in shared memory. Where these are quantized too, words go to wgmma as they
are, and the activations' columns are reordered to match.

The matrix is cut into *blocks* of 64 rows for each of the warpgroups that compute, and these into *steps* of some tiles
of columns. All steps, ordered by block and then column, are dealt out in equal shares to a fixed number of CTAs
("Stream-K", Osama et al., 2023). Who has a part of a block is known beforehand, so no CTA waits for another: a block's
parts lie in as many *slots* of the output, in float32, and XLA adds these where the product is used, in a kernel that
is there anyway. In a CTA one more warpgroup copies to shared memory and runs ahead.

A batch beyond `tile_batch` rows is cut into tiles as well; CTAs of the same share and different tiles run side by side,
so that a weight comes from memory once. Beyond `max_batch` the weight is dequantized by XLA and multiplied as a whole.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.quant_matmul import reference
from pallas_kernels.quant_matmul.weight import KINDS, TILE_COLUMNS, TILE_ROWS, QuantizedWeight, unpack_tiles

SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
# A number for each row of the weight, or of the batch: where a sum over a WGMMA-shaped array leaves it.
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: that compute, 2 to 4; each has 64 rows of the weight.
      step_tiles: tiles of 128 columns in a step; divides the weight's.
      stages: steps under way in a CTA.
      num_ctas: shares that the weight is cut into, for each tile of the batch.
      tile_batch: rows of activations that a CTA takes at most, a multiple of 8.
      split: whether a share may begin and end within a block.
      max_batch: beyond it XLA multiplies the dequantized weight.
    """

    warpgroups: int
    step_tiles: int
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
    # Registers decide: a thread has tile_batch / 2 sums, twice, and 32 for a tile of the weight.
    warpgroups = 4 if tile_batch <= 16 else 3 if tile_batch <= 64 else 2
    tiles_each = R * C / sms
    if tiles_each < 8:  # more parts
        warpgroups = 2
    step_tiles = 2 if C % 2 == 0 and tile_batch <= 16 and weight.format == "int4" and tiles_each >= 16 else 1
    blocks, ctas = -(-R // warpgroups), sms // -(-batch // tile_batch)
    # Slots are read and written in float32: worth it for a small output, or if most multiprocessors had nothing to do.
    split = batch <= 64 or blocks < ctas / 2
    num_ctas = max(1, min(ctas, blocks * (C // step_tiles) if split else blocks))
    return with_stages(weight, Config(warpgroups, step_tiles, 0, num_ctas, tile_batch, split))


def with_stages(weight: QuantizedWeight, config: Config) -> Config:
    """The configuration with as many stages as shared memory has room for."""
    free = SHARED_MEMORY - _shared_bytes(config)
    return replace(config, stages=min(free // _stage_bytes(weight, config), 12))


def fits(weight: QuantizedWeight, config: Config) -> bool:
    """Whether the weight can be cut so, in shared memory and registers."""
    sums = config.tile_batch // 2 * (1 if weight.group_size == -1 else 2)
    in_registers = sums + 64 <= _REGISTERS[config.warpgroups]
    return config.stages >= 2 and weight.codes.shape[1] % config.step_tiles == 0 and in_registers


def _stage_bytes(weight, config):
    """Of codes, activations, scales and zeros of a step, and their barriers."""
    tile = KINDS[weight.format].words * 512 + 64 * _groups_in_tile(weight) * 8
    return config.step_tiles * (config.warpgroups * tile + 2 * TILE_COLUMNS * config.tile_batch) + 16


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
    x, weight: QuantizedWeight, *, activation, out_dtype, config: Config | None = None, interpret: bool = False
):
    """See pallas_kernels.quant_matmul."""
    *batch_shape, in_features = x.shape
    x = x.reshape(-1, in_features)
    batch = x.shape[0]
    config = config or default_config(weight, batch)
    if batch > config.max_batch and activation is None:
        out = reference.quant_matmul(x, weight, activation=None, out_dtype=out_dtype)
        return out.reshape(*batch_shape, weight.out_features)
    if weight.permutation is not None:
        x = x[:, weight.permutation]
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
    def columns(self):
        """Of a step."""
        return self.config.step_tiles * TILE_COLUMNS

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
    if column_tiles % config.step_tiles:
        raise ValueError(f"step_tiles {config.step_tiles} must divide the weight's {column_tiles} tiles of columns")
    batch = x.shape[0]
    tile_batch = min(config.tile_batch, batch + -batch % 8)
    return _Sizes(
        config=config, format=weight.format, dtype=x.dtype, out_dtype=out_dtype, tiles=tiles,
        blocks=-(-tiles // config.warpgroups), steps=column_tiles // config.step_tiles, groups=_groups_in_tile(weight),
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
    if shares.in_slots:
        shape = shares.num_slots, sizes.batch_tiles, tiles, TILE_ROWS, sizes.tile_batch
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
    else:
        rows = sizes.batch if sizes.batch_tiles == 1 else x.shape[0]
        out_type = jax.ShapeDtypeStruct((rows, tiles * TILE_ROWS), out_dtype)
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
    """[slots, batch tiles, tiles, 64, tile_batch] -> [batch tiles * tile_batch, tiles * 64]."""
    total, tiles = slots[0], slots.shape[2]
    for i in range(1, len(slots)):
        in_use = np.repeat(slots_of_block > i, config.warpgroups)[:tiles, None, None]
        total += jnp.where(in_use, slots[i], 0)
    return total.transpose(0, 3, 1, 2).reshape(-1, tiles * TILE_ROWS)


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
    warpgroups, stages, tiles = config.warpgroups, config.stages, config.step_tiles
    itemsize = jnp.dtype(sizes.dtype).itemsize
    line = min(128 // itemsize, sizes.span)
    swizzled = (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line * itemsize))
    grouped = (stages, warpgroups, tiles * sizes.groups, TILE_ROWS)
    copies = 1 + warpgroups * (1 + (sizes.groups > 0) + sizes.has_zeros)
    return _Shared(
        x=plgpu.SMEM((stages, sizes.tile_batch, sizes.columns), sizes.dtype, transforms=swizzled),
        codes=plgpu.SMEM((stages, warpgroups, tiles, *weight.codes.shape[2:]), jnp.int32),
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
    groups = config.step_tiles * sizes.groups
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
            tiles = pl.ds(k * config.step_tiles, config.step_tiles)
            plgpu.copy_gmem_to_smem(codes_ref.at[tile, tiles], shared.codes.at[slot, w], full)
            if sizes.groups:
                at = pl.ds(k * groups, groups)
                plgpu.copy_gmem_to_smem(scales_ref.at[tile, at], shared.scales.at[slot, w], full)
                if sizes.has_zeros:
                    plgpu.copy_gmem_to_smem(zeros_ref.at[tile, at], shared.zeros.at[slot, w], full)
        rows, columns = pl.ds(batch_tile * sizes.tile_batch, sizes.tile_batch), pl.ds(k * sizes.columns, sizes.columns)
        plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], shared.x.at[slot], full)

    lax.fori_loop(0, count, copy, None)


def _compute(sizes, index, batch_tile, warpgroup, x_scales_ref, scales_ref, out_ref, shared):
    """A warpgroup's rows of every block that the share has a part of."""
    shares = _Shares(sizes)
    first, count = shares.first_and_count(index)

    def x_scales_of(tile):
        batch = pl.ds(batch_tile * sizes.tile_batch, sizes.tile_batch)
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
                scales = _by_row(scales_ref.at[tile, 0]).astype(jnp.float32)
                products *= _along_columns(scales, acc.shape)
                if sizes.quantized:
                    products *= x_scales_of(0)
            if shares.in_slots:
                out_ref[index - shares.owner(block * sizes.steps), batch_tile, tile] = products
            else:
                _store(sizes, products, tile, batch_tile, out_ref, shared.out.at[warpgroup])

        return stop

    lax.while_loop(lambda i: i < count, part_of_block, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _along_columns(values, shape):
    return lax.broadcast_in_dim(values, shape, [0])


def _add_step(sizes, warpgroup, shared, count, x_scales_of, block_start, i, acc):
    """Adds the products of a step's tiles to acc, float32 [64, tile_batch]. The block starts with step block_start."""
    config = sizes.config
    slot = lax.rem(i, jnp.int32(config.stages))
    x_scales = None
    if sizes.quantized and sizes.groups:  # asked for before the wait
        x_scales = [x_scales_of((i - block_start) * config.step_tiles + tile) for tile in range(config.step_tiles)]
    plgpu.barrier_wait(shared.full.at[slot])
    for tile in range(config.step_tiles):
        for part, values in enumerate(_unpack(sizes, shared.codes.at[slot, warpgroup, tile])):
            group = tile * sizes.groups + part
            zeros = 8
            if sizes.has_zeros:
                zeros = _by_row(shared.zeros.at[slot, warpgroup, group]).astype(sizes.dtype)
                zeros = _along_columns(zeros, values.shape)
            values = _center(sizes, values, zeros)
            columns = pl.ds(tile * TILE_COLUMNS + part * sizes.span, sizes.span)
            activations = shared.x.at[slot, :, columns].T
            if not sizes.groups and not sizes.quantized:
                acc = _product(sizes, values, activations, warpgroup, shared, acc)
                continue
            # Sums of fp8 products have few bits in the tensor cores: no more than a tile's are left to them.
            scales = _by_row(shared.scales.at[slot, warpgroup, group]).astype(jnp.float32) if sizes.groups else None
            product = _product(sizes, values, activations, warpgroup, shared).astype(jnp.float32)
            if scales is not None:
                product *= _along_columns(scales, acc.shape)
            acc += product if x_scales is None else product * x_scales[tile]

    @pl.when(i + config.stages < count)
    def _():
        plgpu.barrier_arrive(shared.empty.at[slot])

    return acc


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


# PTX that turns words ($4, $5) into registers $0 to $3 of 16-bit values, columns c and c + 8 of the rows r and r + 8.
# A nibble becomes the lowest bits of a number in which a unit is worth 1: of 128 in bfloat16, of 1024 in float16.
_NIBBLES = """
    .reg .b32 t;
    lop3.b32 $0, $4, 0x000f000f, {one}, 0xea;
    shr.u32 t, $4, 4;
    lop3.b32 $1, t, 0x000f000f, {one}, 0xea;
    shr.u32 t, $4, 8;
    lop3.b32 $2, t, 0x000f000f, {one}, 0xea;
    shr.u32 t, $4, 12;
    lop3.b32 $3, t, 0x000f000f, {one}, 0xea;
"""


def _of_bytes(instructions):
    """PTX that makes a register of two bytes, four times. `{out}`, `{word}`, `{low}`: which."""
    each = [(0, 4, True), (1, 5, True), (2, 4, False), (3, 5, False)]
    registers = ".reg .b32 s, t, u;"
    return registers + "".join(
        instructions.format(
            out=f"${out}", word=f"${word}", low="0x4140" if low else "0x4342", high="0x1404" if low else "0x3424"
        )
        for out, word, low in each
    )


# A byte's low seven bits become the mantissa of 128 to 255; its sign, the exponent's lowest bit, of 128 or 256. Their
# difference is the number.
_INT8_BFLOAT16 = _of_bytes("""
    prmt.b32 s, {word}, 0x43, {low};
    and.b32 t, s, 0xff7fff7f;
    and.b32 u, s, 0xff80ff80;
    sub.bf16x2 {out}, t, u;
""")
# With its sign flipped a byte is 128 more, and the mantissa of 1024 has room for it.
_INT8_FLOAT16 = _of_bytes("""
    xor.b32 t, {word}, 0x80808080;
    prmt.b32 {out}, t, 0x64, {low};
""")
# Exponent and mantissa move to where the wider type has them. Its exponent's offset is larger: see _center.
_FP8 = _of_bytes("""
    prmt.b32 s, {word}, 0, {high};
    shr.u32 t, s, SHIFT;
    and.b32 t, t, MASK;
    lop3.b32 {out}, s, 0x80008000, t, 0xea;
""")
_PTX = {
    ("int4", "bfloat16"): (_NIBBLES.format(one="0x43004300"), 1),
    ("int4", "float16"): (_NIBBLES.format(one="0x64006400"), 1),
    ("int8", "bfloat16"): (_INT8_BFLOAT16, 2),
    ("int8", "float16"): (_INT8_FLOAT16, 2),
    ("fp8", "bfloat16"): (_FP8.replace("SHIFT", "4").replace("MASK", "0x07f007f0"), 2),
    ("fp8", "float16"): (_FP8.replace("SHIFT", "1").replace("MASK", "0x3f803f80"), 2),
}


def _unpack(sizes, tile_ref):
    """The values of a tile, but for what `_center` does to them: arrays [64, span]."""
    words = plgpu.load(tile_ref, layout=plgpu.Layout.WG_STRIDED(tile_ref.shape, vec_size=4), optimized=False)
    if sizes.interpret:
        codes = unpack_tiles(words[None, None], sizes.format).astype(sizes.dtype)
        if sizes.quantized:
            codes = codes.reshape(TILE_ROWS, -1, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(codes.shape)
        return [codes[:, i : i + sizes.span] for i in range(0, TILE_COLUMNS, sizes.span)]
    if sizes.quantized:
        return mosaic.registers_of_words(words, "", 1, sizes.span, sizes.dtype)
    ptx, inputs = _PTX[sizes.format, jnp.dtype(sizes.dtype).name]
    return mosaic.registers_of_words(words, ptx, inputs, sizes.span, sizes.dtype)


def _center(sizes, values, zeros):
    """Takes away what the instructions of _PTX leave in the values. All of it is exact."""
    bfloat16 = sizes.dtype == jnp.bfloat16
    if sizes.quantized:
        return values
    if sizes.interpret:
        return values - zeros if sizes.format == "int4" else values
    if sizes.format == "int4":
        return values - (zeros + (128 if bfloat16 else 1024))
    if sizes.format == "int8":
        return values if bfloat16 else values - (1024 + 128)
    return values * 2.0 ** (120 if bfloat16 else 8)


def _store(sizes, products, tile, batch_tile, out_ref, out_smem):
    """Writes the products of 64 rows, transposed."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem.T[...] = products.astype(out_ref.dtype)
    plgpu.commit_smem()
    columns = pl.ds(tile * TILE_ROWS, TILE_ROWS)
    if sizes.batch_tiles == 1:
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, sizes.batch)], out_ref.at[:, columns])
    else:
        rows = pl.ds(batch_tile * sizes.tile_batch, sizes.tile_batch)
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[rows, columns])
