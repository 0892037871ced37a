"""QuantizedWeight: a quantized matrix as it lies on the device, and the ways from and to its canonical form.

*Canonical form*, what a checkpoint's own layout is turned into first:

    codes   [out, in], uint8 0..15 for int4, int8 for int8, float8_e4m3fn for fp8
    scales  [out, in / group_size], or [out, 1] if one scale holds for a whole row
    zeros   like scales; value = (code - zero) * scale

On the device a matrix is cut into tiles of 64 rows and 128 columns, padded with zeros. A tile is a table of 32-bit
words, so ordered that the 128 threads of a warpgroup read what they need as 16 bytes each, side by side, and find it in
the order in which wgmma wants its left operand in registers: of every 16 columns, thread 32 w + 4 g + q has the rows
16 w + g and 16 w + g + 8, the columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. (NVIDIA, PTX ISA, "Register fragments for
wgmma.mma_async.m64nNk16".)
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct
Format = Literal["int4", "int8", "fp8"]

TILE_ROWS = 64
TILE_COLUMNS = 128


class _Kind(NamedTuple):
    """Of a format: the canonical dtype of its codes, words of a thread in a tile, and the zero that codes imply."""

    dtype: np.dtype
    words: int
    middle: int


KINDS = {
    "int4": _Kind(np.dtype(np.uint8), 8, 8),
    "int8": _Kind(np.dtype(np.int8), 16, 0),
    "fp8": _Kind(np.dtype(jnp.float8_e4m3fn), 16, 0),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "permutation"],
    meta_fields=["format", "out_features", "in_features", "group_size"],
)
@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out_features, in_features] of few bits, for `quant_matmul`. A pytree of arrays; made by `pack`.

    For `grouped_matmul` all arrays have one more axis, the first, which counts matrices.

    With R = ceil(out_features / 64) and C = ceil(in_features / 128):

    Attributes:
      codes: i32[R, C, 8, 128] for int4, i32[R, C, 16, 128] for int8 and fp8.
      scales: [R, G, 64] in float32, bfloat16 or float16. G is C * 128 / group_size; C where groups are larger than
        128, which are cut; 1 if group_size is -1.
      zeros: like scales, bfloat16 for integers and float32 for others; None if they are the middle of the codes
        (8 for int4, 0 else).
      permutation: i32[in_features] or None; the product is of x[..., permutation].
      format: "int4", "int8", "fp8".
      group_size: columns that have a scale in common, -1 for all of them.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    permutation: Array | None
    format: Format
    out_features: int
    in_features: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


def abstract(
    out_features: int,
    in_features: int,
    *,
    format: Format,
    group_size: int = -1,
    zeros: bool = False,
    permutation: bool = False,
    scale_dtype=jnp.float32,
) -> QuantizedWeight:
    """A weight whose arrays are `jax.ShapeDtypeStruct`s; with `zeros`, integer ones."""
    _check_format(format, group_size)
    R, C = -(-out_features // TILE_ROWS), -(-in_features // TILE_COLUMNS)
    scales = R, _num_groups(C, group_size), TILE_ROWS
    array = jax.ShapeDtypeStruct
    return QuantizedWeight(
        codes=array((R, C, KINDS[format].words, 128), jnp.int32),
        scales=array(scales, scale_dtype),
        zeros=array(scales, jnp.bfloat16) if zeros else None,
        permutation=array((in_features,), jnp.int32) if permutation else None,
        format=format,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
    )


def pack(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    permutation: np.ndarray | None = None,
    *,
    format: Format,
    group_size: int = -1,
) -> QuantizedWeight:
    """Brings a matrix from canonical form (see the module) to the device's layout, on the host; its arrays are NumPy's.

    Args:
      codes: [out, in] in the format's canonical dtype.
      scales: [out, ceil(in / group_size)], [out, 1] for group_size -1 ([1, 1]: the same for all rows), or
        [ceil(out / 128), ceil(in / 128)] for fp8 in blocks of 128 x 128, group_size 128. Kept in float16 or bfloat16 if
        they are, otherwise in float32.
      zeros: like scales; None for 8 with int4, for 0 with the others.
      permutation: i32[in], for GPTQ's desc_act: column i of `codes` belongs to activation permutation[i].
      group_size: a divisor of 128 that is at least 16, or a multiple of 128, or -1.

    Raises: ValueError naming the argument that does not fit.
    """
    _check_format(format, group_size)
    kind = KINDS[format]
    if codes.ndim != 2 or codes.dtype != kind.dtype:
        raise ValueError(
            f"codes of {format} must be {kind.dtype.name}[out, in], got {codes.dtype.name}{list(codes.shape)}"
        )
    out, in_ = codes.shape
    if permutation is not None and permutation.shape != (in_,):
        raise ValueError(f"permutation must be [in={in_}], got shape {list(permutation.shape)}")
    scales = _per_group("scales", scales, out, in_, format, group_size)
    scales = scales if scales.dtype in (np.float16, jnp.bfloat16) else scales.astype(np.float32)
    if zeros is not None:
        zeros = _per_group("zeros", zeros, out, in_, format, group_size).astype(np.float32)
        if np.all(zeros == kind.middle):
            zeros = None
        elif np.array_equal(zeros, np.round(zeros)) and np.abs(zeros).max() <= 16:
            zeros = zeros.astype(jnp.bfloat16)  # exact
    return QuantizedWeight(
        codes=_pack_codes(codes, format),
        scales=_pack_groups(scales, in_, group_size),
        zeros=None if zeros is None else _pack_groups(zeros, in_, group_size),
        permutation=None if permutation is None else np.asarray(permutation, np.int32),
        format=format,
        out_features=out,
        in_features=in_,
        group_size=group_size,
    )


def unpack_codes(weight: QuantizedWeight) -> jax.Array:
    """The canonical codes [out, in]; for int4 uint8."""
    return unpack_tiles(jnp.asarray(weight.codes), weight.format)[: weight.out_features, : weight.in_features]


def unpack_tiles(words: jax.Array, format: Format) -> jax.Array:
    """i32[R, C, 8 or 16, 128], tiles -> codes [R * 64, C * 128]."""
    R, C = words.shape[:2]
    if format == "int4":
        parts = (words[..., None] >> (4 * jnp.arange(8, dtype=jnp.int32))) & 15
        # R, C, step / 4, warp, g, q, step % 4, then the nibbles: column % 2, column / 8, row / 8
        parts = parts.reshape(R, C, 2, 4, 8, 4, 4, 2, 2, 2).astype(jnp.uint8)
        parts = parts.transpose(0, 3, 9, 4, 1, 2, 6, 8, 5, 7)
    else:
        parts = jax.lax.bitcast_convert_type(words, KINDS[format].dtype)
        # R, C, step / 2, warp, g, q, step % 2, row / 8, then the bytes: column / 8, column % 2
        parts = parts.reshape(R, C, 4, 4, 8, 4, 2, 2, 2, 2)
        parts = parts.transpose(0, 3, 7, 4, 1, 2, 6, 8, 5, 9)
    return parts.reshape(R * TILE_ROWS, C * TILE_COLUMNS)


def dequantize(weight: QuantizedWeight) -> jax.Array:
    """The values, float32[out, in]; columns in the order of the codes, that is, of x[..., permutation]."""
    values = unpack_codes(weight).astype(jnp.float32)
    zeros = KINDS[weight.format].middle if weight.zeros is None else _per_column(weight.zeros, weight)
    return (values - zeros) * _per_column(weight.scales, weight)


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight over the rows of all, in order, such as query, key and value projections. NumPy arrays stay such.

    Raises: ValueError if the weights differ in anything but out_features.
    """
    if not weights:
        raise ValueError("weights must not be empty")
    first = weights[0]
    for name in ("format", "in_features", "group_size"):
        if len({getattr(one, name) for one in weights}) > 1:
            raise ValueError(f"weights must have the same {name}, got {[getattr(one, name) for one in weights]}")
    for one in weights[1:]:
        if (one.permutation is None) != (first.permutation is None) or (
            first.permutation is not None and not np.array_equal(one.permutation, first.permutation)
        ):
            raise ValueError("weights must have the same permutation: x can be gathered in one order alone")
    dtype = functools.reduce(jnp.promote_types, [one.scales.dtype for one in weights])
    weights = [replace(one, scales=one.scales.astype(dtype)) for one in weights]
    if any(one.zeros is not None for one in weights):
        weights = [one if one.zeros is not None else _with_zeros(one) for one in weights]
        dtype = functools.reduce(jnp.promote_types, [one.zeros.dtype for one in weights])
        weights = [replace(one, zeros=one.zeros.astype(dtype)) for one in weights]
    arrays = _join_tiles(weights) if all(one.out_features % TILE_ROWS == 0 for one in weights[:-1]) else _join(weights)
    return replace(first, **arrays, out_features=sum(one.out_features for one in weights))


def _with_zeros(weight):
    middle = KINDS[weight.format].middle
    return replace(weight, zeros=np.full(weight.scales.shape, middle, jnp.bfloat16))


def _join_tiles(weights):
    def join(*arrays):
        return (np if all(isinstance(array, np.ndarray) for array in arrays) else jnp).concatenate(arrays)

    fields = [{"codes": one.codes, "scales": one.scales, "zeros": one.zeros} for one in weights]
    return jax.tree.map(join, *fields)


def _join(weights):
    """Where a weight ends within a tile: by way of canonical form, on the host."""

    def join_groups(name):
        parts = [_by_row(getattr(one, name))[: one.out_features] for one in weights]
        return _tile_rows(np.concatenate([np.asarray(part) for part in parts]))

    codes = np.concatenate([np.asarray(unpack_codes(one)) for one in weights])
    zeros = None if weights[0].zeros is None else join_groups("zeros")
    return {"codes": _pack_codes(codes, weights[0].format), "scales": join_groups("scales"), "zeros": zeros}


def _check_format(format, group_size):
    if format not in KINDS:
        raise ValueError(f"format must be one of {', '.join(KINDS)}, got {format!r}")
    fits = group_size == -1 or (group_size >= 16 and (group_size % TILE_COLUMNS == 0 or TILE_COLUMNS % group_size == 0))
    if not fits:
        raise ValueError(f"group_size must be -1, 16, 32, 64 or a multiple of 128, got {group_size}")


def _num_groups(C, group_size):
    return 1 if group_size == -1 else C * max(1, TILE_COLUMNS // group_size)


def _per_group(name, values, out, in_, format, group_size):
    """Checks scales or zeros; blocks and a single value are spread over rows. [out, groups]"""
    values = np.asarray(values)
    groups = 1 if group_size == -1 else -(-in_ // group_size)
    if values.shape == (out, groups):
        return values
    if group_size == -1 and values.shape == (1, 1):
        return np.broadcast_to(values, (out, 1))
    if format == "fp8" and group_size == 128 and values.shape == (-(-out // 128), groups):
        return np.repeat(values, 128, axis=0)[:out]
    raise ValueError(
        f"{name} must be [out={out}, groups={groups}] for group_size {group_size}, got shape {list(values.shape)}"
    )


def _pack_codes(codes, format):
    out, in_ = codes.shape
    codes = np.pad(codes.view(np.uint8), ((0, -out % TILE_ROWS), (0, -in_ % TILE_COLUMNS)))
    R, C = codes.shape[0] // TILE_ROWS, codes.shape[1] // TILE_COLUMNS
    if format == "int4":
        # R, warp, row / 8, g, C, step / 4, step % 4, column / 8, q, column % 2
        parts = codes.reshape(R, 4, 2, 8, C, 2, 4, 2, 4, 2)
        parts = parts.transpose(0, 4, 5, 1, 3, 8, 6, 9, 7, 2)
        parts = parts.reshape(-1, 2)
        parts = parts[:, 0] | parts[:, 1] << 4
    else:
        # R, warp, row / 8, g, C, step / 2, step % 2, column / 8, q, column % 2
        parts = codes.reshape(R, 4, 2, 8, C, 4, 2, 2, 4, 2)
        parts = parts.transpose(0, 4, 5, 1, 3, 8, 6, 2, 7, 9)
    return parts.reshape(-1).view("<i4").reshape(R, C, KINDS[format].words, 128)


def _pack_groups(values, in_, group_size):
    """[out, groups] -> [R, G, 64]."""
    if group_size > TILE_COLUMNS:
        values = np.repeat(values, group_size // TILE_COLUMNS, axis=1)
    G = _num_groups(-(-in_ // TILE_COLUMNS), group_size)
    values = values[:, :G]
    return _tile_rows(np.pad(values, ((0, 0), (0, G - values.shape[1]))))


def _tile_rows(values):
    """[out, G] -> [R, G, 64]."""
    values = np.pad(values, ((0, -len(values) % TILE_ROWS), (0, 0)))
    return np.ascontiguousarray(values.reshape(-1, TILE_ROWS, values.shape[1]).transpose(0, 2, 1))


def _by_row(values):
    """[R, G, 64] -> [R * 64, G]."""
    return values.swapaxes(1, 2).reshape(-1, values.shape[1])


def _per_column(values, weight):
    """[R, G, 64] -> float32[out, in], or [out, 1] for group_size -1."""
    values = _by_row(jnp.asarray(values, jnp.float32))[: weight.out_features]
    if weight.group_size == -1:
        return values
    return jnp.repeat(values, min(weight.group_size, TILE_COLUMNS), axis=1)[:, : weight.in_features]
