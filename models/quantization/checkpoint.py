"""A checkpoint's quantized layers -> the arrays of packed weights, or floats where no packed weight is declared."""

from collections.abc import Mapping
from functools import partial
from itertools import groupby

import numpy as np

from jaxllm.models.checkpoint_files import CheckpointError, CheckpointTensor
from jaxllm.models.layers.quantized import pack_stack, pack_weight
from jaxllm.models.quantization.apply import PackedPart
from jaxllm.models.quantization.scheme import Canonical, Quantization, concatenate, dequantize

_FLOAT_NAMES = ("weight", "bias")  # what a layer that is not quantized has at most


def problems_of(layer: PackedPart, tensors: Mapping[str, CheckpointTensor]) -> list[str]:
    """What is wrong with the tensors of a layer, by the files' headers alone."""
    problems = []
    for name, expected in layer.stored().items():
        shapes = " or ".join(str(list(shape)) for shape in expected.shapes)
        wanted = f"expected {' or '.join(expected.dtypes)} {shapes} with {layer.scheme.describe()}"
        if name not in tensors:
            if not expected.optional:
                problems.append(f"missing: {name}, {wanted}")
        elif tensors[name].shape not in expected.shapes or tensors[name].dtype not in expected.dtypes:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            problems.append(f"{name} in {tensors[name].file.name}: {wanted}, found {found}")
    return problems


def read_packed(
    path: tuple[str, ...], layers: tuple[PackedPart, ...], tensors: Mapping[str, CheckpointTensor]
) -> dict[tuple[str, ...], np.ndarray]:
    """The arrays of the packed weight at `path`, whose rows are those of `layers`; of a stack of them, for experts.

    Raises: CheckpointError for values that contradict the checkpoint's config.
    """
    of_experts = [list(group) for _, group in groupby(layers, key=lambda layer: layer.expert)]
    weights = (concatenate([_canonical(layer, tensors) for layer in group]) for group in of_experts)
    layout = layers[0].scheme.layout
    if layers[0].expert is None:
        arrays = pack_weight(next(weights), layout)
    else:
        arrays = pack_stack(weights, len(of_experts), layout)
    return {(*path, name): array for name, array in arrays.items()}


def with_floats(
    quantization: Quantization, float_shapes: Mapping[str, tuple[int, ...]], tensors: list[CheckpointTensor]
) -> list[CheckpointTensor]:
    """The checkpoint's tensors, where quantized layers that are to be floats have become such.

    They are those whose weight is no linear layer's in the network, such as latent attention's `kv_b_proj`.

    Args:
      float_shapes: the tensors that are to be floats, with their shapes.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    quantized = {layer for layer, _, last in (name.rpartition(".") for name in by_name) if last not in _FLOAT_NAMES}
    dropped, added = set(), []
    for name, shape in float_shapes.items():
        layer_name, _, last = name.rpartition(".")
        if last != "weight" or len(shape) != 2 or layer_name not in quantized:
            continue
        scheme = quantization.scheme(layer_name)
        if scheme is None:
            continue
        layer = PackedPart(layer_name, *shape, scheme, has_bias=f"{layer_name}.bias" in float_shapes)
        if not problems_of(layer, by_name):
            found = {one: by_name[one] for one in layer.stored() if one in by_name}
            dropped |= found.keys()
            read, file = partial(_read_floats, layer, found), next(iter(found.values())).file
            added.append(CheckpointTensor(name, file, shape, "float32", read))
    return [tensor for tensor in tensors if tensor.name not in dropped] + added


def _read_floats(layer: PackedPart, tensors: Mapping[str, CheckpointTensor]) -> np.ndarray:
    return dequantize(_canonical(layer, tensors), layer.scheme.layout)


def _canonical(layer: PackedPart, tensors: Mapping[str, CheckpointTensor]) -> Canonical:
    values = {name.rpartition(".")[2]: tensors[name].read() for name in layer.stored() if name in tensors}
    if layer.transposed and "weight" in values:
        values["weight"] = values["weight"].T
    try:
        return layer.scheme.canonical(values)
    except ValueError as error:
        raise CheckpointError(f"{layer.name}: {error}") from error
