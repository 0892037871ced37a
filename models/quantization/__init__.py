"""Quantized weights: what a checkpoint's quantization_config means, one file a method.

quantization = read_quantization(config)           # of a config.json; None if it is not quantized
quantization = choose(quantization, "int4")        # with what the user wants
quantization.scheme("model.layers.0.mlp.down_proj").canonical(tensors)
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.quantization import awq, compressed_tensors, fp8, gptq, on_load
from jaxllm.models.quantization.scheme import Canonical, Layout, Quantization, Scheme
from jaxllm.models.quantization.settings import Settings

__all__ = ["METHODS", "STORED_METHODS", "Canonical", "Layout", "Quantization", "Scheme", "choose", "read_quantization"]

_READERS = {
    "gptq": gptq.read,
    "awq": awq.read,
    "fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
}

STORED_METHODS = tuple(_READERS)
"""The `quant_method`s of checkpoints that can be read."""

METHODS = (*on_load.FORMATS, *(name for name in _READERS if name not in on_load.FORMATS))
"""What a user may ask for: a format to quantize to while loading, or the method that the checkpoint has to have."""


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """From the dict of a config.json; None if it has no quantization.

    Raises: ValueError naming the key, its value and what is allowed.
    """
    key = "quantization_config" if config.get("quantization_config") else "compression_config"
    if not config.get(key):
        return None
    settings = Settings(config[key], key)
    return _READERS[settings.choice("quant_method", tuple(_READERS))](settings)


def choose(stored: Quantization | None, wanted: str | None) -> Quantization | None:
    """What a network is to be built with, of what its checkpoint has and one of METHODS that the user wants, or None.

    Raises: ValueError if the two contradict each other.
    """
    if wanted is None or (stored is not None and stored.method == wanted):
        return stored
    if wanted not in METHODS:
        raise ValueError(f"quantization={wanted!r} is not supported; allowed: {', '.join(METHODS)}")
    if stored is not None:
        raise ValueError(f"quantization={wanted!r}: the checkpoint is quantized already, its method is {stored.method}")
    if wanted not in on_load.FORMATS:
        allowed = ", ".join(on_load.FORMATS)
        raise ValueError(f"quantization={wanted!r}: the checkpoint is not quantized; allowed while loading: {allowed}")
    return on_load.OnLoad(wanted)
