"""Checkpoints of the compressed-tensors format, as llm-compressor writes them: int8, int4 and fp8 weights.

`config_groups` say how the layers that their `targets` name are stored. A layer [out, in] has, by the format,

    naive-, int-quantized   weight i8[out, in]; weight_scale [out, 1] or [1]
    float-quantized         weight f8_e4m3[out, in]; weight_scale [out, 1], [1] or by blocks of 128 x 128
    pack-quantized          weight_packed i32[out, in * b / 32], code + 2^(b - 1) in b bits, the first in the lowest;
                            weight_scale [out, groups]; weight_shape i64[2]; with asymmetric codes
                            weight_zero_point i32[out * b / 32, groups], packed likewise along the first axis; with
                            actorder "group" weight_g_idx i32[in], the group of each input

What it says of activations is of no use here: they keep their dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.models.quantization.fp8 import FP8Scheme
from jaxllm.models.quantization.gptq import GROUP_SIZES
from jaxllm.models.quantization.scheme import (
    FLOATS,
    Canonical,
    Layout,
    Scheme,
    Stored,
    from_unsigned,
    half_scales,
    num_groups,
    sort_by_group,
    unpack_words,
)
from jaxllm.models.quantization.settings import Modules, Settings

_INTEGER_FORMATS = ("int-quantized", "naive-quantized")
_FORMATS = (*_INTEGER_FORMATS, "float-quantized", "pack-quantized")


@dataclass(frozen=True)
class Int8Scheme(Scheme):
    granularity: str  # "tensor" or "channel"
    static_inputs: bool

    @property
    def layout(self) -> Layout:
        return Layout("int8")

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        scales = ((), (1,)) if self.granularity == "tensor" else ((out_features, 1), (out_features,))
        tensors = {
            "weight": Stored(((out_features, in_features),), ("int8",)),
            "weight_scale": Stored(scales, FLOATS),
        }
        if self.static_inputs:
            tensors["input_scale"] = Stored(((), (1,)), FLOATS, optional=True)
            tensors["input_zero_point"] = Stored(((), (1,)), ("int8",), optional=True)
        return tensors

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        codes = tensors["weight"]
        scales = tensors["weight_scale"].astype(np.float32).reshape(-1, 1)
        return Canonical(codes, np.broadcast_to(scales, (len(codes), 1)))


@dataclass(frozen=True)
class PackedScheme(Scheme):
    bits: int
    group_size: int
    symmetric: bool
    reordered: bool

    @property
    def layout(self) -> Layout:
        return Layout(f"int{self.bits}", self.group_size, not self.symmetric, self.reordered, "float16")

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        per_word, groups = 32 // self.bits, num_groups(in_features, self.group_size)
        if in_features % per_word:
            raise ValueError(f"its {in_features} inputs must be a multiple of {per_word}, the codes in a word")
        tensors = {
            "weight_packed": Stored(((out_features, in_features // per_word),), ("int32",)),
            "weight_scale": Stored(((out_features, groups),), FLOATS),
            "weight_shape": Stored(((2,),), ("int64", "int32"), optional=True),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = Stored(((-(-out_features // per_word), groups),), ("int32",))
        if self.reordered:
            tensors["weight_g_idx"] = Stored(((in_features,),), ("int32", "int64"))
        return tensors

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        codes, zeros = unpack_words(tensors["weight_packed"], self.bits), None
        if not self.symmetric:
            zeros = unpack_words(tensors["weight_zero_point"].T, self.bits).T[: len(codes)]
        codes, zeros = from_unsigned(codes, zeros, self.bits)
        scales = half_scales(tensors["weight_scale"])
        if not self.reordered:
            return Canonical(codes, scales, zeros)
        codes, permutation = sort_by_group(codes, tensors["weight_g_idx"], self.group_size)
        return Canonical(codes, scales, zeros, permutation)


@dataclass(frozen=True)
class CompressedTensors:
    """A `Quantization` (see scheme.py)."""

    groups: tuple[tuple[Modules | None, Scheme], ...]  # the first that fits counts; None: every linear layer
    kept: Modules

    method = "compressed-tensors"
    output_head = True  # it is a linear layer like any other, and usually among those to ignore

    def scheme(self, name: str) -> Scheme | None:
        if name in self.kept:
            return None
        return next((scheme for targets, scheme in self.groups if targets is None or name in targets), None)


def read(settings: Settings) -> CompressedTensors:
    """From a quantization_config. Raises: ValueError naming the key, its value and what is allowed."""
    groups = settings.section("config_groups")
    if groups is None or not groups.values:
        raise ValueError(f"{settings.where}.config_groups is missing: it says how the weights are stored")
    for key, fixed in (("kv_cache_scheme", "null"), ("transform_config", "null")):
        if settings.values.get(key):
            raise ValueError(f"{settings.where}.{key}={settings.values[key]!r} is not supported; allowed: {fixed}")
    read_groups = [_group(groups.section(name), settings) for name in groups.values]
    # A layer's own name goes before a pattern, and that before the class of all, in whatever order the groups are.
    ordered = [(targets[kind], scheme) for kind in range(3) for targets, scheme in read_groups if kind in targets]
    return CompressedTensors(tuple(ordered), Modules(settings.names("ignore")))


def _group(group: Settings, settings: Settings) -> tuple[dict[int, Modules | None], Scheme]:
    """One of the config_groups: its targets by kind (0: names, 1: patterns, 2: all linear layers), and its scheme."""
    stored = (group if group.values.get("format") is not None else settings).choice("format", _FORMATS)
    weights = group.section("weights")
    if weights is None:
        raise ValueError(f"{group.where}.weights is missing: a group without quantized weights is not supported")
    inputs = group.values.get("input_activations") or {}
    static = not inputs.get("dynamic", True)
    by_kind: dict[int, list[str]] = {}
    for name in group.names("targets"):
        by_kind.setdefault(2 if name == "Linear" else 1 if name.startswith("re:") else 0, []).append(name)
    targets = {kind: None if kind == 2 else Modules(names) for kind, names in by_kind.items()}
    return targets, _scheme(stored, weights, static)


def _scheme(stored: str, weights: Settings, static_inputs: bool) -> Scheme:
    if stored == "pack-quantized":
        return _packed(weights)
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,), True)
    if stored == "float-quantized":
        weights.choice("type", ("float",))
        granularity = weights.choice("strategy", ("tensor", "channel", "block"))
        block = weights.values.get("block_structure")
        if granularity == "block" and list(block or ()) != [128, 128]:
            raise ValueError(f"{weights.where}.block_structure={block!r} is not supported; allowed: [128, 128]")
        return FP8Scheme(granularity, static_inputs=static_inputs)
    weights.choice("type", ("int",), "int")
    return Int8Scheme(weights.choice("strategy", ("tensor", "channel")), static_inputs)


def _packed(weights: Settings) -> PackedScheme:
    weights.choice("type", ("int",), "int")
    grouped = weights.choice("strategy", ("group", "channel")) == "group"
    order = weights.choice("actorder", ("group", "dynamic", "weight", "static", True, False), False)
    return PackedScheme(
        bits=weights.choice("num_bits", (4, 8)),
        group_size=weights.choice("group_size", GROUP_SIZES[1:]) if grouped else -1,
        symmetric=weights.boolean("symmetric", default=True),
        reordered=grouped and order in ("group", "dynamic", True),
    )
