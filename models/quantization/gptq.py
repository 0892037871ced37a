"""GPTQ checkpoints (Frantar et al. 2022), as AutoGPTQ and GPTQModel write them.

A layer [out, in] of b bits in groups of g columns has the tensors

    qweight  i32[in * b / 32, out]   32 / b consecutive rows of a column in a word, the first in the lowest bits
    qzeros   i32[groups, out * b / 32]   likewise along the second axis; format "gptq" stores zero - 1, "gptq_v2" zero
    scales   f16[groups, out]
    g_idx    i32[in]   the group of each input; with desc_act in the order of importance, otherwise i // g
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.models.quantization.scheme import (
    FLOATS,
    Canonical,
    Layout,
    OneScheme,
    Scheme,
    Stored,
    from_unsigned,
    half_scales,
    num_groups,
    sort_by_group,
    unpack_words,
)
from jaxllm.models.quantization.settings import Modules, Settings

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class GPTQScheme(Scheme):
    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    zeros_minus_one: bool

    @property
    def layout(self) -> Layout:
        permuted = self.desc_act and self.group_size != -1
        return Layout(f"int{self.bits}", self.group_size, not self.symmetric, permuted, "float16")

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        per_word = 32 // self.bits
        for what, size in (("inputs", in_features), ("outputs", out_features)):
            if size % per_word:
                raise ValueError(f"its {size} {what} must be a multiple of {per_word}, the codes in a word")
        groups = num_groups(in_features, self.group_size)
        return {
            "qweight": Stored(((in_features // per_word, out_features),), ("int32",)),
            "qzeros": Stored(((groups, out_features // per_word),), ("int32",)),
            "scales": Stored(((groups, out_features),), FLOATS),
            "g_idx": Stored(((in_features,),), ("int32",), optional=not self.layout.permutation),
            # AutoGPTQ once gave every layer a bias, of zeros where the model has none.
            "bias": Stored(((out_features,),), FLOATS, optional=True),
        }

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        if np.any(tensors.get("bias", 0)):
            raise ValueError("bias has values, and the model has no bias in this layer")
        codes, zeros = from_unsigned(unpack_words(tensors["qweight"].T, self.bits), self._zeros(tensors), self.bits)
        scales = half_scales(tensors["scales"].T)
        if self.layout.permutation:
            codes, permutation = sort_by_group(codes, tensors["g_idx"], self.group_size)
            return Canonical(codes, scales, zeros, permutation)
        self._check_in_order(tensors.get("g_idx"), codes.shape[1])
        return Canonical(codes, scales, zeros)

    def _zeros(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """uint8 [out, groups]."""
        zeros = unpack_words(tensors["qzeros"], self.bits).T
        if self.zeros_minus_one:
            zeros = (zeros + 1) & (2**self.bits - 1)
        if not self.symmetric:
            return zeros
        middle = 2 ** (self.bits - 1)
        if np.any(zeros != middle):
            raise ValueError(
                f"sym=true, but qzeros are not all {middle}; set sym=false in quantization_config, or, if they are all "
                f"{middle - 1} or {middle + 1}, the checkpoint_format that the weights have: gptq or gptq_v2"
            )
        return None

    def _check_in_order(self, groups: np.ndarray | None, in_features: int) -> None:
        size = in_features if self.group_size == -1 else self.group_size
        if groups is not None and not np.array_equal(groups, np.arange(in_features) // size):
            raise ValueError("g_idx is not in order, as desc_act=false says it is; set desc_act=true")


def read(settings: Settings) -> OneScheme:
    """From a quantization_config. Raises: ValueError naming the key, its value and what is allowed."""
    # AutoGPTQ's name and transformers'.
    key = "checkpoint_format" if settings.values.get("checkpoint_format") is not None else "format"
    checkpoint_format = settings.choice(key, ("gptq", "gptq_v2"), "gptq")
    scheme = GPTQScheme(
        bits=settings.choice("bits", (4, 8)),
        group_size=settings.choice("group_size", GROUP_SIZES),
        symmetric=settings.boolean("sym", default=True),
        desc_act=settings.boolean("desc_act", default=False),
        zeros_minus_one=checkpoint_format == "gptq",
    )
    return OneScheme("gptq", scheme, _excluded(settings), output_head=settings.boolean("lm_head", default=False))


def _excluded(settings: Settings) -> Modules:
    """What GPTQModel's `dynamic` leaves out, by patterns that begin with "-:"; any that change bits are refused."""
    dynamic = settings.values.get("dynamic") or {}
    changed = [pattern for pattern in dynamic if not pattern.startswith("-:")]
    if changed:
        raise ValueError(f"{settings.where}.dynamic[{changed[0]!r}] is not supported; allowed: patterns of '-:...'")
    return Modules(tuple(f"re:{pattern.removeprefix('-:')}" for pattern in dynamic))
