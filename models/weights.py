"""Checkpoint files -> a network's parameters on the device, and back.

Names and shapes are derived from the network: its table of names and its weights' declarations. That nothing is
missing, unused or of another shape is proven from the files' headers, before any value is read.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxllm.models.checkpoint_files import CheckpointError, CheckpointTensor, list_tensors
from jaxllm.models.interface import Network, Params, checkpoint_names
from jaxllm.models.layers.param import ParamSpec
from jaxllm.models.lora import Adapter
from jaxllm.models.quantization.checkpoint import problems_of, read_packed, with_floats
from jaxllm.models.quantization.scheme import FLOATS

ParamPath = tuple[str, ...]  # ("layers", "0", "attention", "qkv", "weight")

_THREADS = 4  # a copy in each: one alone does not keep a GPU's link busy


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    """[rows, columns], each row divided by its Euclidean norm, in float32."""
    matrix = matrix.astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    return matrix / np.maximum(norms, 1e-12)[:, None]


# What a row of `weight_names` may ask for. Each, applied to its own result, gives a checkpoint's tensor again.
TRANSFORMS = {"transposed": np.transpose, "unit_rows": _unit_rows}


@dataclass(frozen=True)
class Slot:
    """Where one of the checkpoint's tensors goes: rows start : start + shape[0] of a parameter (of a stacked one, with
    its matrices one below the other)."""

    path: ParamPath
    start: int
    shape: tuple[int, ...]
    transform: str | None = None

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        return self.shape[::-1] if self.transform == "transposed" else self.shape

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """The view of the parameter that the tensor fills."""
        return weight.reshape(-1, *self.shape[1:])[self.start : self.start + self.shape[0]]

    def transformed(self, values: np.ndarray) -> np.ndarray:
        return TRANSFORMS[self.transform](values) if self.transform else values


def load_params(
    network: Network,
    folder: str | Path,
    *,
    adapter: Adapter | None = None,
    shardings: Any = None,
    progress: bool = True,
) -> dict:
    """The parameters of a network, read from a checkpoint folder onto the device.

    Streams, with a few threads: besides the device's arrays, memory holds as many weights as there are threads.

    Args:
      folder: with model.safetensors or pytorch_model.bin, or with shards of either and their index.
      adapter: to be merged into the weights, in float32, before they are rounded to the network's dtype.
      shardings: where the weights go: one Sharding or Device, or a tree of them like `network.abstract_params`; None
        for the default device.
      progress: show a progress bar.
    Raises: CheckpointError with all problems in one message: tensors missing, unused or of a wrong shape; or missing
      shards; or a damaged file, with what to do about it.
    """
    slots = checkpoint_slots(network)
    tensors = _fitting_tensors(network, slots, Path(folder), adapter)
    _check_tied_head(network, tensors)
    targets = _targets(network, shardings)

    def run(job: Callable[[], dict[ParamPath, np.ndarray]]) -> dict[ParamPath, jax.Array]:
        # The device's array must not share memory with a file's. Waiting for the copy bounds the host's memory.
        return {
            path: jax.block_until_ready(jax.device_put(values, targets[path], may_alias=False))
            for path, values in job().items()
        }

    params: dict[ParamPath, jax.Array] = {}
    total = sum(spec.abstract.size * spec.dtype.itemsize for spec in network.specs.values())
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for loaded in threads.map(run, _jobs(network, slots, tensors)):
            params |= loaded
            bar.update(sum(array.nbytes for array in loaded.values()))
    return unflatten_dict(params)


def check_checkpoint(network: Network, folder: str | Path, adapter: Adapter | None = None) -> None:
    """Prove, from the files' headers alone, that a folder holds a network's weights. Raises: as `load_params`."""
    _fitting_tensors(network, checkpoint_slots(network), Path(folder), adapter)


def _fitting_tensors(
    network: Network, slots: Mapping[str, Slot], folder: Path, adapter: Adapter | None
) -> list[CheckpointTensor]:
    tensors = _fully_named(network, slots, list_tensors(folder))
    if adapter is not None:
        tensors = adapter.merged(tensors, network.tied_head)
    if network.config.quantization is not None:
        float_shapes = {name: slot.file_shape for name, slot in slots.items()}
        tensors = with_floats(network.config.quantization, float_shapes, tensors)
    _raise_if(_problems_of_tensors(network, slots, tensors), f"{folder} does not fit {network.config.architecture}")
    return tensors


def _check_tied_head(network: Network, tensors: list[CheckpointTensor]) -> None:
    """Raises CheckpointError where a head that should be the embedding is in the files too, with other values."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if network.tied_head is None or not by_name.keys() >= set(network.tied_head):
        return
    head, embedding = network.tied_head
    if not np.array_equal(by_name[head].read(), by_name[embedding].read()):
        raise CheckpointError(
            f"tie_word_embeddings=true, but {head} is not {embedding}: the model was trained with a head of its own. "
            'Open it with hf_overrides={"tie_word_embeddings": False}, or set that in its config.json'
        )


def check_params(network: Network, params: Params) -> None:
    """Prove that in-memory parameters are what the network needs.

    Raises: CheckpointError naming every missing and unused parameter and every wrong shape and dtype.
    """
    if not isinstance(params, dict):
        raise CheckpointError(f"the parameters must be a nested dict of arrays, not a {type(params).__name__}")
    given, problems = flatten_dict(params), []
    for path, spec in network.specs.items():
        name, expected = ".".join(path), f"{spec.dtype} {list(spec.shape)}"
        if path not in given:
            problems.append(f"missing: {name}, expected {expected}")
        elif not hasattr(given[path], "dtype"):
            problems.append(f"{name}: expected an array, {expected}, found a {type(given[path]).__name__}")
        elif tuple(given[path].shape) != spec.shape or given[path].dtype != spec.dtype:
            found = f"{given[path].dtype} {list(given[path].shape)}"
            problems.append(f"{name}: expected {expected}, found {found}")
    problems += [f"unused: {'.'.join(map(str, path))}" for path in given if path not in network.specs]
    _raise_if(problems, f"the parameters do not fit {network.config.architecture}")


def save_checkpoint(network: Network, params: Params, folder: str | Path) -> Path:
    """Write parameters as `folder/model.safetensors` under the checkpoint's names; the inverse of `load_params`.

    Raises: ValueError for a quantized network; CheckpointError for parameters that are not the network's.
    """
    if network.packed:
        raise ValueError("a quantized network cannot be saved: save the one that it was quantized from")
    check_params(network, params)
    flat = flatten_dict(params)
    tensors = {name: _as_saved(slot, np.asarray(flat[slot.path])) for name, slot in checkpoint_slots(network).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _as_saved(slot: Slot, weight: np.ndarray) -> np.ndarray:
    values = slot.transformed(slot.rows(weight))
    return np.ascontiguousarray(values.astype(weight.dtype, copy=False))


def checkpoint_slots(network: Network) -> dict[str, Slot]:
    """The checkpoint's name of each tensor that the network needs, but for packed weights' -> where it goes."""
    slots = {}
    for path, spec in network.specs.items():
        if path[:-1] in network.packed:
            continue
        start, shape = 0, spec.shape[1:] if spec.stacked else spec.shape
        for expert in range(spec.shape[0] if spec.stacked else 1):
            names = checkpoint_names(network.weight_names, path, expert)
            # A merged weight is merged already in checkpoints whose row for it names no part.
            for part, size in spec.parts if spec.parts and None not in names else ((None, shape[0]),):
                if part not in names:
                    raise ValueError(
                        f"weight_names of {network.config.architecture} has no row for {path}, part {part!r}"
                    )
                name, transform = names[part]
                slots[name] = Slot(path, start, (size, *shape[1:]), transform if len(shape) > 1 else None)
                start += size
    return slots


def _fully_named(
    network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]
) -> list[CheckpointTensor]:
    """The tensors, those that are needed and lack one of the family's optional prefixes under their full names."""
    needed = slots.keys() | {name for layers in network.packed.values() for layer in layers for name in layer.stored()}

    def full_name(name: str) -> str:
        candidates = (prefix + name for prefix in ("", *network.optional_prefixes))
        return next((candidate for candidate in candidates if candidate in needed), name)

    return [replace(tensor, name=full_name(tensor.name)) for tensor in tensors]


def _jobs(
    network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]
) -> list[Callable[[], dict[ParamPath, np.ndarray]]]:
    """For each weight, what reads it from its tensors, in the order in which the first of them lies in the files."""
    by_name = {tensor.name: tensor for tensor in tensors}
    order = {name: i for i, name in enumerate(by_name)}
    plain: dict[ParamPath, list[tuple[Slot, CheckpointTensor]]] = {}
    for name, slot in slots.items():
        plain.setdefault(slot.path, []).append((slot, by_name[name]))
    jobs = []
    for path, parts in plain.items():
        first = min(order[tensor.name] for _, tensor in parts)
        jobs.append((first, partial(_read_plain, path, network.specs[path], parts)))
    for path, layers in network.packed.items():
        first = min(order[name] for layer in layers for name in layer.stored() if name in order)
        jobs.append((first, partial(read_packed, path, layers, by_name)))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def _read_plain(
    path: ParamPath, spec: ParamSpec, parts: list[tuple[Slot, CheckpointTensor]]
) -> dict[ParamPath, np.ndarray]:
    if len(parts) == 1 and parts[0][0].shape == spec.shape:
        slot, tensor = parts[0]
        return {path: slot.transformed(tensor.read()).astype(spec.dtype, copy=False)}
    values = np.empty(spec.shape, spec.dtype)
    for slot, tensor in parts:
        slot.rows(values)[...] = slot.transformed(tensor.read())
    return {path: values}


def _problems_of_tensors(network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]) -> list[str]:
    by_name = {tensor.name: tensor for tensor in tensors}
    where = ", ".join(sorted({tensor.file.name for tensor in tensors}))
    problems = [
        f"missing: {name}, expected shape {list(slot.file_shape)}, is in none of {where}"
        for name, slot in slots.items()
        if name not in by_name
    ]
    layers = [layer for layers in network.packed.values() for layer in layers]
    problems += [problem for layer in layers for problem in problems_of(layer, by_name)]
    used = slots.keys() | {name for layer in layers for name in layer.stored()}
    for tensor in tensors:
        name, file, shape = tensor.name, tensor.file.name, list(tensor.shape)
        if name in slots and slots[name].file_shape != tensor.shape:
            problems.append(f"{name} in {file}: expected shape {list(slots[name].file_shape)}, found {shape}")
        elif name in slots and tensor.dtype not in ("float64", *FLOATS):
            problems.append(f"{name} in {file}: expected one of {', '.join(FLOATS)}, found {tensor.dtype}")
        elif name in used and by_name[name].file.name != file:
            problems.append(f"{name} is in both {file} and {by_name[name].file.name}")
        elif name not in used and not any(fnmatchcase(name, pattern) for pattern in network.ignored_weights):
            problems.append(f"unused: {name} in {file}, shape {shape}")
    return problems


def _raise_if(problems: list[str], headline: str) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{headline}, {len(problems)} problem(s):", *problems]))


def _targets(network: Network, shardings: Any) -> dict[ParamPath, Any]:
    if isinstance(shardings, Mapping):
        return flatten_dict(shardings)
    return dict.fromkeys(network.specs, shardings)
