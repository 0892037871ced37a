"""What is common to all quantization methods: how one layer's weight is stored, and its canonical form.

A method (a file of this package) says for each layer of a checkpoint which Scheme it is stored by. A Scheme names the
layer's tensors and turns their values into the canonical form, from which the device's layout is packed. NumPy alone:
nothing here knows a network or a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

FLOAT8 = ml_dtypes.float8_e4m3fn
FLOATS = ("float32", "bfloat16", "float16")


class Canonical(NamedTuple):
    """A weight [out, in] as codes: value = (code - zero) * scale. See pallas_kernels.quant_matmul.pack."""

    codes: np.ndarray  # [out, in] uint8 0..15 (int4), int8 or float8_e4m3fn
    scales: np.ndarray  # [out, in / group_size], or [out, 1]
    zeros: np.ndarray | None = None  # like scales; None: the middle, 8 for int4 and 0 for the others
    permutation: np.ndarray | None = None  # i32[in]: column i of codes belongs to input permutation[i]


@dataclass(frozen=True)
class Layout:
    """What a packed weight is made of, without its shape: the arguments of pallas_kernels.quant_matmul.abstract."""

    format: str  # int4, int8 or fp8
    group_size: int = -1  # columns that have a scale in common; -1: all of them
    zeros: bool = False
    permutation: bool = False
    scale_dtype: str = "float32"


@dataclass(frozen=True)
class Stored:
    """One tensor of a layer, as the checkpoint must have it."""

    shapes: tuple[tuple[int, ...], ...]  # any of them
    dtypes: tuple[str, ...]  # any of them
    optional: bool = False


class Scheme(ABC):
    """How one linear layer's weight [out, in] lies in a checkpoint. Equal schemes can be merged into one weight."""

    layout: Layout

    def describe(self) -> str:
        """Its settings, for messages."""
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    @abstractmethod
    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        """The layer's tensors by the last word of their names ("qweight", "scales", ...).

        Raises: ValueError if no tensors could hold a weight of this shape.
        """

    @abstractmethod
    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        """The weight, from the tensors that `stored` names.

        Raises: ValueError for values that contradict the checkpoint's config.
        """


class Quantization(Protocol):
    """What a checkpoint's quantization_config says, or what it is to be quantized to while loading.

    Attributes:
      method: its name, as config.json or the user gives it.
      output_head: whether output heads are quantized, unless their name is excluded.
    """

    method: str
    output_head: bool

    def scheme(self, name: str) -> Scheme | None:
        """Of the linear layer that the checkpoint calls `name`; None if it is not quantized."""
        ...


@dataclass(frozen=True)
class OneScheme:
    """A `Quantization` by one scheme."""

    method: str
    layers: Scheme
    kept: Container[str] = ()  # layers that are not quantized
    output_head: bool = False

    def scheme(self, name: str) -> Scheme | None:
        return None if name in self.kept else self.layers


def dequantize(weight: Canonical, layout: Layout) -> np.ndarray:
    """float32 [out, in], the columns in the order of the layer's inputs."""
    columns = weight.codes.shape[1]
    middle = 8 if layout.format == "int4" else 0
    zeros = np.full(weight.scales.shape, middle) if weight.zeros is None else weight.zeros

    def per_column(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        return values if layout.group_size == -1 else np.repeat(values, layout.group_size, axis=1)[:, :columns]

    values = (weight.codes.astype(np.float32) - per_column(zeros)) * per_column(weight.scales)
    if weight.permutation is None:
        return values
    unsorted = np.empty_like(values)
    unsorted[:, weight.permutation] = values
    return unsorted


def concatenate(weights: list[Canonical]) -> Canonical:
    """One weight over the rows of all. Their permutations must be None."""
    if len(weights) == 1:
        return weights[0]
    codes, scales, zeros, _ = zip(*weights, strict=True)
    return Canonical(np.concatenate(codes), np.concatenate(scales), None if zeros[0] is None else np.concatenate(zeros))


def num_groups(in_features: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-in_features // group_size)


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """i32[..., n] -> uint8[..., n * 32 / bits]: the codes of a word, the one in its lowest bits first."""
    values = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return values
    return np.stack((values & 15, values >> 4), axis=-1).reshape(*values.shape[:-1], -1)


def from_unsigned(codes: np.ndarray, zeros: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and zeros 0..255 shifted to the canonical int8; those of 4 bits stay. uint8 -> (codes, int16 zeros)."""
    zeros = None if zeros is None else zeros.astype(np.int16)
    if bits == 4:
        return codes, zeros
    return (codes ^ 128).view(np.int8), None if zeros is None else zeros - 128


def half_scales(scales: np.ndarray) -> np.ndarray:
    """float16, the dtype in which nearly all checkpoints store the scales of groups.

    Raises: ValueError for scales beyond float16's range.
    """
    halves = scales.astype(np.float16)
    if not np.all(np.isfinite(halves)):
        raise ValueError(f"a scale of {np.abs(scales.astype(np.float32)).max()} is beyond the range of float16")
    return halves


def sort_by_group(codes: np.ndarray, groups: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of codes [out, in] in the order of their groups i32[in] -> (codes, permutation i32[in]).

    Raises: ValueError if a group has another size than group_size.
    """
    count = num_groups(len(groups), group_size)
    expected = np.full(count, group_size)
    expected[-1] = len(groups) - group_size * (count - 1)
    if groups.min() < 0 or groups.max() >= count or np.any(np.bincount(groups, minlength=count) != expected):
        raise ValueError(f"g_idx does not give each of the {count} groups its group_size={group_size} columns")
    permutation = np.argsort(groups, kind="stable").astype(np.int32)
    return codes[:, permutation], permutation
