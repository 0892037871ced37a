"""Checkpoint files -> a network's parameters on the device, and back.

Names and shapes are derived from the network: its table of names and its weights' declarations. That nothing is
missing, unused or of another shape is proven from the files' headers, before any value is read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxllm.models.checkpoint_files import CheckpointError, CheckpointTensor, list_tensors
from jaxllm.models.interface import Network, Params

ParamPath = tuple[str, ...]  # ("layers", "0", "attention", "qkv", "weight")


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


def load_params(network: Network, folder: str | Path, *, shardings: Any = None, progress: bool = True) -> dict:
    """The parameters of a network, read from a checkpoint folder onto the device in the network's dtype.

    Streams: besides the device's arrays, memory holds one tensor, or the merged weights it is a part of.

    Args:
      folder: with model.safetensors or pytorch_model.bin, or with shards of either and their index.
      shardings: where the weights go: one Sharding or Device, or a tree of them like `network.abstract_params`; None
        for the default device.
      progress: show a progress bar.
    Raises: CheckpointError with all problems in one message: tensors missing, unused or of a wrong shape; or missing
      shards; or a damaged file, with what to do about it.
    """
    slots = checkpoint_slots(network)
    tensors = _fully_named(network, slots, list_tensors(Path(folder)))
    _raise_if(_problems_of_tensors(network, slots, tensors), f"{folder} does not fit {network.config.architecture}")
    targets = _targets(network, shardings)
    total = sum(spec.abstract.size for spec in network.specs.values()) * network.dtype.itemsize
    params = {}
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, values in _stream(network, slots, tensors):
            # Waiting for the copy, and forgetting its source, keeps at most one weight in the host's memory.
            params[path] = jax.block_until_ready(jax.device_put(values, targets[path]))
            bar.update(values.nbytes)
            del values
    return unflatten_dict(params)


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
    """Write parameters as `folder/model.safetensors` under the checkpoint's names; the inverse of `load_params`."""
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
    """The checkpoint's name of each tensor that the network needs -> where it goes."""
    slots = {}
    for path, spec in network.specs.items():
        start, shape = 0, spec.shape[1:] if spec.stacked else spec.shape
        for expert in range(spec.shape[0] if spec.stacked else 1):
            names = _checkpoint_names(network.weight_names, path, expert)
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


def _checkpoint_names(weight_names: tuple, path: ParamPath, expert: int) -> dict[str | None, tuple[str, str | None]]:
    """A parameter's part (None: all of it) -> the checkpoint's name and the transform, from the model's table. `expert`
    is which matrix of a stacked weight."""
    module, leaf = ".".join(path[:-1]), path[-1]
    names = {}
    for theirs, ours, *rest in weight_names:
        match = re.fullmatch(re.escape(ours).replace(r"\{\}", r"(\d+)"), module)
        if match:
            part, transform = (*rest, None, None)[:2]
            names[part] = (f"{theirs.format(*match.groups(), expert)}.{leaf}", transform)
    return names


def _fully_named(
    network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]
) -> list[CheckpointTensor]:
    """The tensors, those that are needed and lack one of the family's optional prefixes under their full names."""

    def full_name(name: str) -> str:
        candidates = (prefix + name for prefix in ("", *network.optional_prefixes))
        return next((candidate for candidate in candidates if candidate in slots), name)

    return [replace(tensor, name=full_name(tensor.name)) for tensor in tensors]


def _stream(
    network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]
) -> Iterator[tuple[ParamPath, np.ndarray]]:
    """Each parameter as soon as its last part is read. Reads every tensor once, in the files' order."""
    waiting = Counter(slot.path for slot in slots.values())  # how many parts are still to come
    merging: dict[ParamPath, np.ndarray] = {}
    for tensor in tensors:
        if tensor.name not in slots:
            continue
        slot = slots[tensor.name]
        spec = network.specs[slot.path]
        if slot.shape == spec.shape:
            yield slot.path, slot.transformed(tensor.read()).astype(spec.dtype, copy=False)
            continue
        if slot.path not in merging:
            merging[slot.path] = np.empty(spec.shape, spec.dtype)
        slot.rows(merging[slot.path])[...] = slot.transformed(tensor.read())
        waiting[slot.path] -= 1
        if not waiting[slot.path]:
            yield slot.path, merging.pop(slot.path)


def _problems_of_tensors(network: Network, slots: Mapping[str, Slot], tensors: list[CheckpointTensor]) -> list[str]:
    files = {tensor.name: tensor.file.name for tensor in tensors}
    where = ", ".join(sorted(set(files.values())))
    problems = [
        f"missing: {name}, expected shape {list(slot.file_shape)}, is in none of {where}"
        for name, slot in slots.items()
        if name not in files
    ]
    for tensor in tensors:
        name, file, shape = tensor.name, tensor.file.name, list(tensor.shape)
        if name in slots and slots[name].file_shape != tensor.shape:
            problems.append(f"{name} in {file}: expected shape {list(slots[name].file_shape)}, found {shape}")
        elif name in slots and files[name] != file:
            problems.append(f"{name} is in both {file} and {files[name]}")
        elif name not in slots and not any(fnmatchcase(name, pattern) for pattern in network.ignored_weights):
            problems.append(f"unused: {name} in {file}, shape {shape}")
    return problems


def _raise_if(problems: list[str], headline: str) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{headline}, {len(problems)} problem(s):", *problems]))


def _targets(network: Network, shardings: Any) -> dict[ParamPath, Any]:
    if isinstance(shardings, Mapping):
        return flatten_dict(shardings)
    return dict.fromkeys(network.specs, shardings)
