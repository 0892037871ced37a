"""Words of a packed tile become what the tensor cores take: the left operand of a product, in registers."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import inline_ptx
from pallas_kernels.mosaic import plgpu
from pallas_kernels.quant_matmul.weight import TILE_COLUMNS, TILE_ROWS, unpack_tiles

# PTX that turns words ($4, $5) into registers $0 to $3 of 16-bit values, columns c and c + 8 of the rows r and r + 8.
# A nibble is the lowest bits of a denormal number, or the next higher ones: the hardware multiplies these as well, and
# takes the middle of the codes away. All are brought to the same unit, for the larger one is out of bfloat16's reach.
_NIBBLES = """
    .reg .b32 s, t, low, high, middle;
    mov.b32 low, {low};
    mov.b32 high, {high};
    mov.b32 middle, {middle};
    shr.u32 s, $4, 8;
    and.b32 t, $4, 0x000f000f;
    fma.rn.{dtype}x2 $0, t, low, middle;
    and.b32 t, $4, 0x00f000f0;
    fma.rn.{dtype}x2 $1, t, high, middle;
    and.b32 t, s, 0x000f000f;
    fma.rn.{dtype}x2 $2, t, low, middle;
    and.b32 t, s, 0x00f000f0;
    fma.rn.{dtype}x2 $3, t, high, middle;
"""
_NIBBLE_UNIT = 2.0**-9
# The same without the product, which is half of the instructions: in rows r a code is as many of the smallest denormal
# numbers, in rows r + 8 sixteen times as many, and zeros are left to be taken from sums.
_CODES = """
    .reg .b32 s;
    shr.u32 s, $4, 8;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, $4, 0x00f000f0;
    and.b32 $2, s, 0x000f000f;
    and.b32 $3, s, 0x00f000f0;
"""
SMALLEST = {"bfloat16": 2.0**-133, "float16": 2.0**-24}
# What activations are multiplied by before such a product, for 2^-133 times anything small is out of float32's reach.
ACTIVATION_FACTOR = {"bfloat16": 2.0**60, "float16": 1.0}
_BYTE_UNIT = 2.0**-6  # of int8 in bfloat16


def _nibbles(dtype, centered):
    """For `_PTX`: codes less 8, or codes, times _NIBBLE_UNIT."""
    if dtype == "bfloat16":  # 2^124, 2^120, -2^-6; a denormal's lowest bit is 2^-133
        low, high, middle = "0x7d807d80", "0x7b807b80", "0xbc80bc80"
    else:  # 2^15, 2^11, -2^-6; 2^-24
        low, high, middle = "0x78007800", "0x68006800", "0xa400a400"
    # -0 is what changes no sum.
    return _NIBBLES.format(
        dtype={"bfloat16": "bf16", "float16": "f16"}[dtype],
        low=low,
        high=high,
        middle=middle if centered else "0x80008000",
    )


def _of_bytes(instructions):
    """PTX that makes a register of two bytes, four times. `{out}`, `{word}`, `{low}`: which; `{signed}` fills a
    byte's other half with its sign."""
    each = [(0, 4, True), (1, 5, True), (2, 4, False), (3, 5, False)]
    registers = ".reg .b32 s, t, u;"
    return registers + "".join(
        instructions.format(
            out=f"${out}", word=f"${word}", low="0x4140" if low else "0x4342", signed="0x9180" if low else "0xb3a2"
        )
        for out, word, low in each
    )


# With its sign flipped a byte is 128 more, and the lowest bits of a number that is denormal or the next larger ones.
_INT8_BFLOAT16 = """
    .reg .b32 large, middle;
    mov.b32 large, 0x7f007f00;
    mov.b32 middle, 0xc000c000;
""" + _of_bytes("""
    xor.b32 t, {word}, 0x80808080;
    prmt.b32 s, t, 0, {low};
    fma.rn.bf16x2 {out}, s, large, middle;
""")  # 2^127, -2
# Or the mantissa of 1024 has room for it.
_INT8_FLOAT16 = _of_bytes("""
    xor.b32 t, {word}, 0x80808080;
    prmt.b32 {out}, t, 0x64, {low};
""")
# Sign, exponent and mantissa move to where the wider type has them. Its exponent's offset is larger: see _corrected.
_FP8 = _of_bytes("""
    prmt.b32 s, {word}, 0, {signed};
    shl.b32 t, s, SHIFT;
    and.b32 {out}, t, MASK;
""")
_PTX = {
    ("int8", "bfloat16"): (_INT8_BFLOAT16, 2),
    ("int8", "float16"): (_INT8_FLOAT16, 2),
    ("fp8", "bfloat16"): (_FP8.replace("SHIFT", "4").replace("MASK", "0x87f087f0"), 2),
    ("fp8", "float16"): (_FP8.replace("SHIFT", "7").replace("MASK", "0xbf80bf80"), 2),
}


def load_words(ref):
    """A tile's words, i32[8 or 16, 128], each with the thread that has its values in the tensor cores."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4), optimized=False)


def along_columns(values, shape):
    """A number for each row -> `shape`."""
    return lax.broadcast_in_dim(values, shape, [0])


def codes_of(words, format, dtype, span, interpret):
    """A tile's codes as they are, for activations of their type: arrays [64, span], columns as `_quantize` has them."""
    if interpret:
        codes = unpack_tiles(words[None, None], format).astype(dtype)
        codes = codes.reshape(TILE_ROWS, -1, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(codes.shape)
        return _cut(codes, span)
    return inline_ptx.registers_of_words(words, "", 1, span, dtype)


def nibbles_of(words, dtype, span, interpret):
    """A tile's int4 codes in units of the smallest number of dtype, see `scale_nibbles`: arrays [64, span]."""
    if interpret:
        return _cut(unpack_tiles(words[None, None], "int4").astype(dtype), span)
    return inline_ptx.registers_of_words(words, _CODES, 1, span, dtype)


def minus_nibble(code, span, dtype, interpret):
    """-code in the units of `nibbles_of`, everywhere in an array [64, span]."""
    if interpret:
        return jnp.full((TILE_ROWS, span), -code, dtype)
    low, high = (((0x8000 | bits) * 0x10001) - 2**32 for bits in (code, 16 * code))  # as a signed number
    return inline_ptx.constant_operand(low, high, span, dtype)


def scale_nibbles(scales, dtype, interpret):
    """float32 [64]: what brings products of `nibbles_of` and activations times ACTIVATION_FACTOR to `scales`."""
    if interpret:
        return scales
    name = jnp.dtype(dtype).name
    one = 1 / (SMALLEST[name] * ACTIVATION_FACTOR[name])
    return inline_ptx.scale_rows(scales, one, one / 16)


def unit(format: str, dtype, interpret: bool) -> float:
    """What `values_of` returns for 1."""
    if interpret or format == "fp8":
        return 1.0
    if format == "int4":
        return _NIBBLE_UNIT
    return _BYTE_UNIT if dtype == jnp.bfloat16 else 1.0


def values_of(words, format, dtype, span, zeros, interpret):
    """A tile's codes less their zeros, times `unit`, in bfloat16 or float16, exact: arrays [64, span].

    Args:
      words: from `load_words`.
      zeros: [64] for each array, in its dtype; None for 8 with int4 and 0 with others.
    """
    if interpret:
        values = unpack_tiles(words[None, None], format).astype(dtype)
        arrays = _cut(values if zeros is not None or format != "int4" else values - 8, span)
    else:
        name = jnp.dtype(dtype).name
        ptx, inputs = (_nibbles(name, zeros is None), 1) if format == "int4" else _PTX[format, name]
        arrays = [
            _corrected(values, format) for values in inline_ptx.registers_of_words(words, ptx, inputs, span, dtype)
        ]
    if zeros is None:
        return arrays
    # A product by a power of two, which a number of few bits survives.
    zeros = [zero * unit(format, dtype, interpret) for zero in zeros]
    return [values - along_columns(zero, values.shape) for values, zero in zip(arrays, zeros, strict=True)]


def _cut(values, span):
    return [values[:, i : i + span] for i in range(0, TILE_COLUMNS, span)]


def _corrected(values, format):
    """Takes away what the instructions of _PTX leave in the values."""
    bfloat16 = values.dtype == jnp.bfloat16
    if format == "int8":
        return values if bfloat16 else values - (1024 + 128)
    if format == "fp8":
        return values * 2.0 ** (120 if bfloat16 else 8)
    return values
