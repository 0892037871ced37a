"""A quantized checkpoint's network: which of its linear layers hold packed weights, and what they are made of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flax import nnx

from jaxllm.models.interface import checkpoint_names
from jaxllm.models.layers.linear import Linear, StackedLinear
from jaxllm.models.quantization.scheme import Quantization, Scheme, Stored


@dataclass(frozen=True)
class PackedPart:
    """A quantized layer of the checkpoint, whose weight [out_features, in_features] is some rows of a packed one."""

    name: str  # "model.layers.0.self_attn.q_proj"
    out_features: int
    in_features: int
    scheme: Scheme
    has_bias: bool
    transposed: bool = False  # the checkpoint has a weight that is not packed as [in, out]
    expert: int | None = None  # whose, in a stack of packed weights

    def stored(self) -> dict[str, Stored]:
        """The tensors that hold the weight, by their whole names."""
        tensors = self.scheme.stored(self.out_features, self.in_features)
        if self.has_bias:  # then it is a parameter of its own
            tensors.pop("bias", None)
        if self.transposed and "weight" in tensors:
            tensors["weight"] = replace(tensors["weight"], shapes=((self.in_features, self.out_features),))
        return {f"{self.name}.{last}": tensor for last, tensor in tensors.items()}


def quantize_linears(module: nnx.Module, quantization: Quantization) -> dict[tuple[str, ...], tuple[PackedPart, ...]]:
    """Have a model's linear layers declare packed weights, where the checkpoint has such.

    Returns: for each packed weight, by its path, the checkpoint's layers that its rows come from, in order; for a stack
      of experts' weights those of expert 0, then those of expert 1, ...
    Raises: ValueError naming the layer whose shape does not fit, or the parts of a merged layer that differ.
    """
    packed = {}
    for path, linear in list(_linears(module)):
        parts = _parts(module, path, linear, quantization)
        if parts is None:
            continue
        # With a permutation each part has an order of columns of its own.
        separate = parts[0].scheme.layout.permutation and parts[0].out_features < linear.out_features
        linear.quantize(parts[0].scheme.layout, separate)
        if separate:
            count = len(linear.part_names)
            packed |= {(*path, "weight", name): parts[i::count] for i, name in enumerate(linear.part_names)}
        else:
            packed[(*path, "weight")] = parts
    return packed


def _linears(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], Linear | StackedLinear]]:
    for path, child in nnx.iter_modules(module):
        if isinstance(child, Linear | StackedLinear):
            yield tuple(map(str, path)), child


def _parts(
    module: nnx.Module, path: tuple[str, ...], linear: Linear | StackedLinear, quantization: Quantization
) -> tuple[PackedPart, ...] | None:
    """The checkpoint's layers behind a linear layer; None if they are not quantized."""
    if linear.out_features == 1 or (linear.axes[0] == "vocab" and not quantization.output_head):
        return None  # a gate, which no method quantizes; or the output head
    layers = list(_layers(module, path, linear))
    schemes = [quantization.scheme(name) for name, *_ in layers]
    for (name, *_), scheme in zip(layers, schemes, strict=True):
        if scheme != schemes[0]:
            raise ValueError(
                f"{quantization.method}: {layers[0][0]} and {name} are parts of one weight here and must be quantized "
                "alike"
            )
    if schemes[0] is None:
        return None
    for name, size, *_ in layers:
        _check_shape(schemes[0], name, size, linear.in_features)
    return tuple(
        PackedPart(name, size, linear.in_features, schemes[0], linear.bias is not None, transposed, expert)
        for name, size, transposed, expert in layers
    )


def _layers(
    module: nnx.Module, path: tuple[str, ...], linear: Linear | StackedLinear
) -> Iterator[tuple[str, int, bool, int | None]]:
    """The checkpoint's name of each layer behind a linear one, its outputs, whether it is transposed, whose it is."""
    for expert in range(linear.num_experts) if isinstance(linear, StackedLinear) else (None,):
        names = checkpoint_names(module.weight_names, (*path, "weight"), expert or 0)
        parts = dict(zip(linear.part_names, linear.part_sizes, strict=True))
        if not parts or None in names:  # the checkpoint may have merged them already
            parts = {None: linear.out_features}
        for part, size in parts.items():
            name, transform = names[part]
            yield name.removesuffix(".weight"), size, transform == "transposed", expert


def _check_shape(scheme: Scheme, layer: str, out_features: int, in_features: int) -> None:
    try:
        scheme.stored(out_features, in_features)
    except ValueError as error:
        raise ValueError(f"{layer} [{out_features}, {in_features}] cannot be stored quantized: {error}") from None
