"""Quantization of an unquantized checkpoint while it is loaded: each weight rounded to the nearest of its codes.

int8  a scale for each output: the largest magnitude is 127
fp8   a scale for each output: the largest magnitude is 448, e4m3's greatest
int4  a scale and a zero for each group of 128 inputs: the smallest value is 0, the largest 15
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.models.quantization.scheme import FLOAT8, FLOATS, Canonical, Layout, Scheme, Stored

FORMATS = ("int8", "fp8", "int4")
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_GROUP_SIZE = 128
_ROWS = 1024  # at a time, which bounds the float32 copies


@dataclass(frozen=True)
class OnLoadScheme(Scheme):
    layout: Layout

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        return {"weight": Stored(((out_features, in_features),), FLOATS)}

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        weight = tensors["weight"]
        blocks = [weight[start : start + _ROWS].astype(np.float32) for start in range(0, len(weight), _ROWS)]
        quantize = _groups if self.layout.format == "int4" else _rows
        codes, scales, zeros = zip(*(quantize(block, self.layout) for block in blocks), strict=True)
        return Canonical(
            np.concatenate(codes), np.concatenate(scales), None if zeros[0] is None else np.concatenate(zeros)
        )


@dataclass(frozen=True)
class OnLoad:
    """A `Quantization` (see scheme.py)."""

    method: str  # one of FORMATS

    output_head = False

    def scheme(self, name: str) -> Scheme | None:
        if self.method == "int4":
            return OnLoadScheme(Layout("int4", _GROUP_SIZE, zeros=True, scale_dtype="float16"))
        return OnLoadScheme(Layout(self.method))


def _rows(weight: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, None]:
    """float32 [rows, in] -> (codes, scales [rows, 1], None)."""
    largest = _LARGEST[layout.format]
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * largest) / largest
    codes = weight / scales
    if layout.format == "fp8":
        return np.clip(codes, -largest, largest).astype(FLOAT8), scales, None
    return np.rint(codes).astype(np.int8), scales, None


def _groups(weight: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [rows, in] -> (codes, float16 scales [rows, groups], zeros). Zero is always among the values."""
    rows, in_features = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -in_features % layout.group_size))).reshape(rows, -1, layout.group_size)
    low, high = np.minimum(padded.min(axis=2), 0), np.maximum(padded.max(axis=2), 0)
    scales = np.maximum((high - low) / 15, np.finfo(np.float16).tiny).astype(np.float16)
    steps = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / steps), 0, 15).astype(np.int16)
    codes = np.clip(np.rint(padded / steps[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return codes.reshape(rows, -1)[:, :in_features], scales, zeros
