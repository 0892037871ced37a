"""AWQ checkpoints (Lin et al. 2023), as AutoAWQ writes them in its version "gemm".

A layer [out, in] in groups of g columns has the tensors

    qweight  i32[in, out / 8]       eight outputs in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up
    qzeros   i32[in / g, out / 8]   likewise
    scales   f16[in / g, out]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.models.quantization.gptq import GROUP_SIZES
from jaxllm.models.quantization.scheme import (
    FLOATS,
    Canonical,
    Layout,
    OneScheme,
    Scheme,
    Stored,
    half_scales,
    num_groups,
    unpack_words,
)
from jaxllm.models.quantization.settings import Modules, Settings

_NIBBLE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AWQScheme(Scheme):
    group_size: int

    @property
    def layout(self) -> Layout:
        return Layout("int4", self.group_size, zeros=True, scale_dtype="float16")

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        if out_features % 8:
            raise ValueError(f"its {out_features} outputs must be a multiple of 8, the codes in a word")
        groups = num_groups(in_features, self.group_size)
        return {
            "qweight": Stored(((in_features, out_features // 8),), ("int32",)),
            "qzeros": Stored(((groups, out_features // 8),), ("int32",)),
            "scales": Stored(((groups, out_features),), FLOATS),
        }

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        codes, zeros = _unpack(tensors["qweight"]).T, _unpack(tensors["qzeros"]).T
        return Canonical(np.ascontiguousarray(codes), half_scales(tensors["scales"].T), zeros)


def read(settings: Settings) -> OneScheme:
    """From a quantization_config. Raises: ValueError naming the key, its value and what is allowed."""
    settings.choice("bits", (4,))
    settings.choice("version", ("gemm", "GEMM"), "gemm")
    settings.choice("zero_point", (True,), True)
    scheme = AWQScheme(settings.choice("group_size", GROUP_SIZES))
    return OneScheme("awq", scheme, Modules(settings.names("modules_to_not_convert")))


def _unpack(words: np.ndarray) -> np.ndarray:
    """i32[rows, n] -> uint8[rows, 8 n], in the order of the outputs."""
    nibbles = unpack_words(words, 4).reshape(len(words), -1, 8)
    return nibbles[..., _NIBBLE_OF_OUTPUT].reshape(len(words), -1)
