"""Instructions that Pallas Mosaic GPU has no names for, as PTX: conversions of packed words to operands of the tensor
cores, copies by single warps, and products by single warps.

It knows no op.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels.mosaic import plgpu


def registers_of_words(words: jax.Array, ptx: str, inputs: int, columns: int, dtype) -> list[jax.Array]:
    """Makes left operands of the tensor cores from 32-bit words that already lie with the threads that need them.

    A register holds two values of 16 bits or four of 8 bits that are neighbours in a row. A thread's registers go by
    columns, 8 or 16 a register, then by row / 8.

    Args:
      words: i32[n, 128] in the layout WG_STRIDED with vec_size 4.
      ptx: instructions that turn words $4... into registers $0 to $3. "" takes a word as a register.
      inputs: how many words it takes.
      columns: of each array.
      dtype: of 16 or 8 bits.

    Returns: arrays [64, columns] in the layout WGMMA or WGMMA_8BIT, as many as the registers fill.
    """
    values = 4 // jnp.dtype(dtype).itemsize
    layout = plgpu.Layout.WGMMA if values == 2 else plgpu.Layout.WGMMA_8BIT
    per_thread = words.size // 128
    registers = per_thread if not ptx else per_thread // inputs * 4
    count = registers * 128 * values // (64 * columns)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_STRIDED(words.shape, vec_size=4),),
        return_type=[plgpu.ShapeDtypeStruct((64, columns), dtype, layout=layout)] * count,
    )
    def convert(_, words):
        vectors = words.registers.flat
        flat = [vector.extract(v, [], [i]) for v in vectors for i in range(4)]
        if ptx:
            flat = [r for i in range(0, len(flat), inputs) for r in _four_registers(ptx, flat[i : i + inputs])]
        register_type = ir.VectorType.get((values,), mgpu.utils.dtype_to_ir_type(dtype))
        flat = [mgpu.utils.bitcast(r, register_type) for r in flat]
        each = len(flat) // count
        return [_array(flat[i * each : (i + 1) * each], (64, columns), layout, dtype) for i in range(count)]

    return convert(words)


def constant_operand(low: int, high: int, columns: int, dtype) -> jax.Array:
    """A left operand of the tensor cores [64, columns] in the layout WGMMA, of 16-bit values.

    `low`, `high`: the 32 bits of two neighbours in rows whose number is less than 8 modulo 16, and in others.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(), return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, layout=layout))
    def make(_):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        both = [mgpu.utils.bitcast(mgpu.c(bits, i32), pair) for bits in (low, high)]
        return _array(both * (columns // 8), (64, columns), layout, dtype)

    return make()


def scale_rows(values: jax.Array, low: float, high: float) -> jax.Array:
    """Values times `low` in rows whose number is less than 8 modulo 16, times `high` in others.

    `values`: float32 [64] in the layout WGMMA.reduce(1).
    """
    layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.float32, layout=layout)
    )
    def scale(_, values):
        factors = [mgpu.c(factor, ir.F32Type.get()) for factor in (low, high)]
        registers = [
            arith.mulf(r, vector.broadcast(r.type, factors[i % 2])) for i, r in enumerate(values.registers.flat)
        ]
        return _array(registers, values.shape, layout, jnp.float32)

    return scale(values)


def store_by_column(values: jax.Array, ref) -> None:
    """Keeps an array whose rows differ by row // 8 % 2 alone, and by the tile of `copy_by_warps` that they are of.

    Args:
      values: float32 [64, n] in the layout WGMMA.
      ref: float32 [fold, 2 n] in shared memory, without transforms. A thread finds there what it has written itself.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, values, ref):
        address = _own_columns(ref)
        for i, pairs in enumerate(values.registers.reshape(-1, 2)):
            operands = [address, *_elements(pairs)]
            _act(f"st.shared.v4.f32 [$0 + {64 * i}], {{$1, $2, $3, $4}};", operands, "r,f,f,f,f")

    store(values, ref)


def load_by_column(ref, n: int) -> jax.Array:
    """float32 [64, n] in the layout WGMMA: what `store_by_column` has kept."""
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, layout=layout)
    )
    def load(_, ref):
        address, registers = _own_columns(ref), []
        for i in range(n // 8):
            ptx = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {64 * i}];"
            four = _inline(ptx, [ir.F32Type.get()] * 4, [address], "=f,=f,=f,=f,r,~{memory}", has_side_effects=True)
            registers += [_pair(four[:2]), _pair(four[2:])]
        return _array(registers, (64, n), layout, jnp.float32)

    return load(ref)


def _own_columns(ref):
    """Where a thread has its part of a row of ref: 16 bytes of 64."""
    i32 = ir.IntegerType.get_signless(32)
    lane, warp = _lane_and_warp()
    fold, elements = ref.type.shape
    line = arith.muli(_tile_of_warp(warp, fold), mgpu.c(4 * elements, i32))
    own = arith.muli(arith.remui(lane, mgpu.c(4, i32)), mgpu.c(16, i32))
    return arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref)), arith.addi(line, own))


def copy_by_warps(words, lines, part, wanted) -> None:
    """Begins to copy tiles from global to shared memory, if `wanted`, a scalar. See `wait_for_copies`.

    Of one tile, each of a warpgroup's four warps copies the words and rows that are its own in the layout WGMMA. Of
    `fold` tiles, 2 or 4, these lie in four strips as well, and a warp copies a strip of one: the first 4 / fold warps
    from the first tile, and so on, all from the `part`-th of the tiles' `fold` parts. What a warp copies is for itself
    alone, so that no warp waits for another.

    Args:
      words: (source, target), references to i32[fold, n, 128] and i32[n, 128] without transforms, n a multiple of 4; a
        strip is every fourth line. For the threads that have the target in the layout WG_STRIDED with vec_size 4.
      lines: list of (source, target), references to [fold, n, 64], or [1, n, 64] for all tiles, and [n, 64] without
        transforms, of 16 or 32 bits; a strip is 16 elements of each line.
      part: a scalar, 0 to fold - 1.
    """
    pairs = [words, *lines]
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 2 * len(pairs), scalar, scalar))
    def copy(_, *arguments):
        *refs, part, wanted = arguments
        part, wanted = part.registers.item(), wanted.registers.item()
        i32 = ir.IntegerType.get_signless(32)
        wanted = arith.cmpi(arith.CmpIPredicate.ne, wanted, mgpu.c(0, i32))
        fold = refs[0].type.shape[0]
        lane, warp = _lane_and_warp()
        tile = _tile_of_warp(warp, fold)
        each = mgpu.c(4 // fold, i32)
        strip = arith.addi(arith.muli(part, each), arith.remui(warp, each))

        def offsets(ref, strip_bytes, own):
            """Of a thread in the source, and in the target."""
            tile_bytes = _size(ref) * math.prod(ref.type.shape[1:]) if ref.type.shape[0] == fold else 0
            start = arith.addi(arith.muli(tile, mgpu.c(tile_bytes, i32)), arith.muli(strip, mgpu.c(strip_bytes, i32)))
            return arith.addi(start, own), arith.addi(arith.muli(warp, mgpu.c(strip_bytes, i32)), own)

        source, target = refs[:2]
        own = arith.muli(lane, mgpu.c(16, i32))
        skips = range(0, 4 * math.prod(target.type.shape), 4 * 512)
        _copy_pieces(source, target, *offsets(source, 512, own), skips, wanted)
        for source, target in zip(refs[2::2], refs[3::2], strict=True):
            count, elements = target.type.shape
            line = elements * _size(source)
            pieces = mgpu.c(line // 64, i32)  # of 16 bytes, in a strip of a line
            number = arith.divui(lane, pieces)
            own = arith.muli(number, mgpu.c(line, i32))
            own = arith.addi(own, arith.muli(arith.remui(lane, pieces), mgpu.c(16, i32)))
            there = arith.andi(wanted, arith.cmpi(arith.CmpIPredicate.ult, number, mgpu.c(count, i32)))
            _copy_pieces(source, target, *offsets(source, line // 4, own), [0], there)
        _act("cp.async.commit_group;", [], "")

    copy(*[ref for pair in pairs for ref in pair], part, wanted.astype(jnp.int32))


def copy_by_warpgroup(source, target, wanted) -> None:
    """Begins to copy from global to shared memory, if `wanted`, a scalar; a part of the next call of `copy_by_warps`.

    Every thread copies for all of its warpgroup: after `wait_for_copies` comes `wait_for_warpgroup`.

    Args:
      source, target: references to [rows, columns] of 16 bits, rows 16-byte aligned; columns is 128, 256 or 512.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), scalar))
    def copy(_, source, target, wanted):
        i32 = ir.IntegerType.get_signless(32)
        wanted = arith.cmpi(arith.CmpIPredicate.ne, wanted.registers.item(), mgpu.c(0, i32))
        for (there, start), (_, end) in zip(_own_pieces(source), _own_pieces(target), strict=True):
            _copy_pieces(source, target, start, end, [0], arith.andi(wanted, there))

    copy(source, target, wanted.astype(jnp.int32))


def scale_copied(ref, factor: float) -> None:
    """Multiplies what `copy_by_warpgroup` has brought to `ref`, of bfloat16, by a power of two.

    A thread does so to what it has copied itself: between `wait_for_copies` and `wait_for_warpgroup`.
    """
    bits = int(np.asarray(factor, jnp.bfloat16).view(np.uint16)) * 0x10001

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def scale(_, ref):
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
        for there, offset in _own_pieces(ref):
            products = "".join(f"mul.rn.bf16x2 r{i}, r{i}, factor;" for i in range(4))
            _act(
                "{.reg .b32 r0, r1, r2, r3, factor;"
                f"mov.b32 factor, {bits:#x};"
                "@$0 ld.shared.v4.b32 {r0, r1, r2, r3}, [$1];"
                f"{products}"
                "@$0 st.shared.v4.b32 [$1], {r0, r1, r2, r3};}",
                [there, arith.addi(base, offset)],
                "b,r",
            )

    scale(ref)


def _own_pieces(ref):
    """A warpgroup's thread's pieces of 16 bytes in [rows, columns] of 16 bits: whether it is there, and its offset."""
    i32 = ir.IntegerType.get_signless(32)
    rows, columns = ref.type.shape
    (stride, _), _ = ref.type.get_strides_and_offset()
    pieces = columns // 8  # in a row
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))
    row, piece = (f(thread, mgpu.c(pieces, i32)) for f in (arith.divui, arith.remui))
    piece = arith.muli(piece, mgpu.c(16, i32))
    for first in range(0, rows, 128 // pieces):
        own = arith.addi(row, mgpu.c(first, i32))
        there = arith.cmpi(arith.CmpIPredicate.ult, own, mgpu.c(rows, i32))
        yield there, arith.addi(arith.muli(own, mgpu.c(2 * stride, i32)), piece)


def wait_for_warpgroup() -> None:
    """Waits for all threads of the warpgroup, and has what they wrote seen."""

    @plgpu.inline_mgpu()
    def wait(_):
        mgpu.warpgroup_barrier()

    wait()


def _lane_and_warp():
    """Of a thread in its warp, and of that in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))
    return arith.remui(thread, mgpu.c(32, i32)), arith.divui(thread, mgpu.c(32, i32))


def _tile_of_warp(warp, fold):
    return arith.divui(warp, mgpu.c(4 // fold, ir.IntegerType.get_signless(32)))


def _size(ref):
    """Bytes of an element."""
    return mgpu.utils.bitwidth(ref.type.element_type) // 8


def _copy_pieces(source, target, start, end, skips, wanted):
    """16 bytes of each thread, between offsets of its own and then as far on as `skips` says."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    start = arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(source)), arith.extui(i64, start))
    end = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(target)), end)
    for skip in skips:
        _act(f"@$0 cp.async.cg.shared.global.L2::128B [$1 + {skip}], [$2 + {skip}], 16;", [wanted, end, start], "b,r,l")


def wait_for_copies(but: int) -> None:
    """Waits for the warp's calls of copy_by_warps, but for the last ones."""

    @plgpu.inline_mgpu()
    def wait(_):
        _act(f"cp.async.wait_group {but};\n bar.warp.sync 0xffffffff;", [], "")

    wait()


def _act(ptx, operands, constraints):
    """PTX instructions that change memory."""
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, constraints, has_side_effects=True)


def add_product(acc: jax.Array, values: jax.Array, x, column: int, fold: int) -> jax.Array:
    """acc + values x transposed activations, by the tensor cores' instructions for a single warp.

    Unlike wgmma these wait for nothing but their operands.

    Args:
      acc: float32 [64, n] in the layout WGMMA, n a multiple of 8.
      values: bfloat16 or float16 [64, columns] in the layout WGMMA, columns a multiple of 16.
      x: of the same dtype, [up to n, fold * 128] in shared memory without transforms; its last row stands for those
        that it lacks. A row and the next should be an odd multiple of 16 bytes apart, so that all banks are busy.
      column, fold: where in x the values' columns begin, and, for the tiles of `copy_by_warps`, into how many parts the
        values' rows fall: those of the second begin 128 columns on, and so forth.

    Returns: float32 [64, n] in the layout WGMMA.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout),
    )
    def multiply(_, acc, values, x):
        # [columns / 8, row / 8] and [n / 8, row / 8], each a vector of two neighbours in a row
        left = values.registers.reshape(-1, 2)
        zeros = [mgpu.c(0.0, ir.F32Type.get())] * 4
        sums = [[_elements(pair), zeros] for pair in acc.registers.reshape(-1, 2)]  # two, which do not wait for another
        dtype = str(values.mlir_dtype)
        i32 = ir.IntegerType.get_signless(32)
        for k in range(0, len(left), 4):
            many = left[k : k + 4]
            registers = [mgpu.utils.bitcast(register, i32) for register in many.flat]
            for n in range(len(sums)):
                right = _load_matrices(x, 8 * n, column + 8 * k, len(many), fold)
                for i in range(0, len(many), 2):
                    one = (k + i) // 2 % 2
                    sums[n][one] = _mma(dtype, sums[n][one], registers[2 * i : 2 * i + 4], right[i : i + 2])
        sums = [[arith.addf(a, b) for a, b in zip(*both, strict=True)] for both in sums]
        registers = [_pair(pair) for each in sums for pair in (each[:2], each[2:])]
        return _array(registers, acc.shape, layout, jnp.float32)

    return multiply(acc, values, x)


def store_sums(parts, ref) -> None:
    """ref[...] = parts.sum(axis=0).T[: rows of ref], by one warpgroup.

    Args:
      parts: float32 [m, 64, n] in shared memory, without transforms; taken as [parts, rows, n].
      ref: [up to n, rows] in global memory, of 16 or 32 bits, a row's elements side by side; rows is 16, 32 or 64.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def store(_, parts, ref):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        f32, dtype, size = ir.F32Type.get(), ref.type.element_type, _size(ref)
        (stride, _), _ = ref.type.get_strides_and_offset()
        rows, n = ref.type.shape[1], parts.type.shape[2]
        start, target = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(parts)), mgpu.utils.memref_ptr(ref)
        thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))
        row, first = arith.remui(thread, mgpu.c(rows, i32)), arith.divui(thread, mgpu.c(rows, i32))
        for column in range(0, ref.type.shape[0], 128 // rows):
            column = arith.addi(first, mgpu.c(column, i32))
            there = arith.cmpi(arith.CmpIPredicate.ult, column, mgpu.c(ref.type.shape[0], i32))
            # What is not there is read as well: the sums have more columns.
            own = arith.addi(arith.muli(row, mgpu.c(4 * n, i32)), arith.muli(column, mgpu.c(4, i32)))
            address, total = arith.addi(start, own), mgpu.c(0.0, f32)
            for skip in range(0, 4 * math.prod(parts.type.shape), 4 * rows * n):
                ptx = f"ld.shared.f32 $0, [$1 + {skip}];"
                total = arith.addf(total, _inline(ptx, [f32], [address], "=f,r,~{memory}", has_side_effects=True)[0])
            value = total if size == 4 else arith.truncf(dtype, total)
            value = mgpu.utils.bitcast(value, ir.IntegerType.get_signless(8 * size))
            offset = arith.addi(arith.muli(column, mgpu.c(stride, i32)), row)
            offset = arith.muli(arith.extui(i64, offset), mgpu.c(size, i64))
            address = arith.addi(llvm.ptrtoint(i64, target), offset)
            _act(f"@$0 st.global.b{8 * size} [$1], $2;", [there, address, value], "b,l," + {2: "h", 4: "r"}[size])

    store(parts, ref)


def store_transposed(values: jax.Array, ref) -> None:
    """ref[...] = values.T[: rows of ref], straight from registers.

    Args:
      values: float32 [64, n] in the layout WGMMA.
      ref: float32 [up to n, 64] in global memory, a row's elements side by side.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, values, ref):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        (stride, _), _ = ref.type.get_strides_and_offset()
        lane, warp = _lane_and_warp()
        column = arith.muli(arith.remui(lane, mgpu.c(4, i32)), mgpu.c(2, i32))
        row = arith.addi(arith.muli(warp, mgpu.c(16, i32)), arith.divui(lane, mgpu.c(4, i32)))
        own = arith.muli(arith.addi(arith.muli(column, mgpu.c(stride, i32)), row), mgpu.c(4, i32))
        address = arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)), arith.extui(i64, own))
        for i, pairs in enumerate(values.registers.reshape(-1, 2)):
            for j, value in enumerate(_elements(pairs)):  # of two neighbours in a row, and in the row 8 further on
                skip = 8 * i + j % 2
                own = arith.addi(column, mgpu.c(skip, i32))
                there = arith.cmpi(arith.CmpIPredicate.ult, own, mgpu.c(ref.type.shape[0], i32))
                offset = 4 * (skip * stride + 8 * (j // 2))
                _act(f"@$0 st.global.f32 [$1 + {offset}], $2;", [there, address, value], "b,l,f")

    store(values, ref)


def _array(registers, shape, layout, dtype):
    """An array of a thread's registers, a list."""
    layout = layout.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=mgpu.utils.is_signed(dtype),
    )


def _elements(vectors):
    return [vector.extract(v, [], [i]) for v in vectors for i in range(2)]


def _pair(elements):
    return vector.from_elements(ir.VectorType.get((2,), elements[0].type), elements)


def _load_matrices(x, row, column, count, fold):
    """Registers of 8 rows and 8 columns each, next to each other. See `add_product`."""
    i32 = ir.IntegerType.get_signless(32)
    (stride, _), _ = x.type.get_strides_and_offset()
    lane, warp = _lane_and_warp()
    # Every 8 threads say where a matrix has its rows.
    row = arith.addi(arith.remui(lane, mgpu.c(8, i32)), mgpu.c(row, i32))
    row = arith.minui(row, mgpu.c(x.type.shape[0] - 1, i32))
    matrix = arith.divui(lane, mgpu.c(8, i32))
    offset = arith.addi(arith.muli(row, mgpu.c(2 * stride, i32)), arith.muli(matrix, mgpu.c(16, i32)))
    offset = arith.addi(offset, arith.muli(_tile_of_warp(warp, fold), mgpu.c(256, i32)))
    address = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(x)), offset)
    outputs = ", ".join(f"${i}" for i in range(count))
    ptx = f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{outputs}}}, [${count} + {2 * column}];"
    # Has an effect as far as the compiler is told, for what is there changes.
    return _inline(ptx, [i32] * count, [address], ",".join(["=r"] * count + ["r"]), has_side_effects=True)


def _mma(dtype, sums, left, right):
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    ptx += " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    return _inline(ptx, [ir.F32Type.get()] * 4, [*left, *right, *sums], constraints)


def _inline(ptx, types, operands, constraints, has_side_effects=False):
    """The results of PTX instructions, of one type."""
    type = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    result = llvm.inline_asm(type, operands, ptx, constraints, has_side_effects=has_side_effects)
    return [result] if len(types) == 1 else [llvm.extractvalue(type, result, [i]) for i, type in enumerate(types)]


def _four_registers(ptx, words):
    i32 = ir.IntegerType.get_signless(32)
    return _inline("{" + ptx + "}", [i32] * 4, words, ",".join(["=&r"] * 4 + ["r"] * len(words)))
