"""FP8 checkpoints: e4m3 weights with a scale for a tensor (AutoFP8) or for blocks of 128 x 128 (DeepSeek-V3, Qwen3).

A layer [out, in] has the tensors

    weight            f8_e4m3[out, in]
    weight_scale      f32[] or [1]: value = code * scale; or, in blocks,
    weight_scale_inv  f32[ceil(out / 128), ceil(in / 128)], which in spite of its name is multiplied too
    input_scale       f32[] or [1]   for activations in fp8, of no use here: activations keep their dtype
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.models.quantization.scheme import FLOATS, Canonical, Layout, OneScheme, Scheme, Stored, num_groups
from jaxllm.models.quantization.settings import Modules, Settings

_BLOCK = 128
_SCALAR = ((), (1,))


@dataclass(frozen=True)
class FP8Scheme(Scheme):
    """`granularity`: "tensor", "channel" (a scale for each output) or "block"."""

    granularity: str
    scale_name: str = "weight_scale"
    static_inputs: bool = False

    @property
    def layout(self) -> Layout:
        return Layout("fp8", _BLOCK if self.granularity == "block" else -1)

    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        blocks = (num_groups(out_features, _BLOCK), num_groups(in_features, _BLOCK))
        shapes = {"tensor": _SCALAR, "channel": ((out_features, 1), (out_features,)), "block": (blocks,)}
        tensors = {
            "weight": Stored(((out_features, in_features),), ("float8_e4m3fn",)),
            self.scale_name: Stored(shapes[self.granularity], FLOATS),
        }
        if self.static_inputs:
            tensors["input_scale"] = Stored(_SCALAR, FLOATS, optional=True)
        return tensors

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> Canonical:
        codes, scales = tensors["weight"], tensors[self.scale_name].astype(np.float32)
        out_features = len(codes)
        if self.granularity == "block":
            # By rows, so that layers merge into one weight even where a block ends within a tile.
            return Canonical(codes, np.repeat(scales, _BLOCK, axis=0)[:out_features])
        return Canonical(codes, np.broadcast_to(scales.reshape(-1, 1), (out_features, 1)))


def read(settings: Settings) -> OneScheme:
    """From a quantization_config. Raises: ValueError naming the key, its value and what is allowed."""
    settings.choice("fmt", ("e4m3",), "e4m3")
    static = settings.choice("activation_scheme", ("static", "dynamic"), "dynamic") == "static"
    block = settings.values.get("weight_block_size")
    if block is not None and list(block) != [_BLOCK, _BLOCK]:
        raise ValueError(f"{settings.where}.weight_block_size={block!r} is not supported; allowed: [128, 128]")
    scheme = (
        FP8Scheme("tensor", static_inputs=static) if block is None else FP8Scheme("block", "weight_scale_inv", static)
    )
    kept = Modules(settings.names("modules_to_not_convert") + settings.names("ignored_layers"))
    return OneScheme("fp8", scheme, kept)
