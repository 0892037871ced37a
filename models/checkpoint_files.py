"""The tensors of a checkpoint folder, whichever files hold them: safetensors or .bin, one file or shards with an index.

It knows file formats and no model. Headers are read at once, values one tensor at a time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.models import torch_pickle

# In the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with everything found wrong with it."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor on disk: what its file says it is, and how to read it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def list_tensors(folder: Path) -> list[CheckpointTensor]:
    """All tensors of a folder, file by file, in the order in which they lie in it.

    Raises: CheckpointError for no weights, missing shards (all of them named), or a damaged file.
    """
    return [tensor for file in weight_files(Path(folder)) for tensor in _tensors_of(file)]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)}; it holds {present}")
    return [found] if found.suffix != ".json" else _shards(found)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); download it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names files outside of its folder: {outside}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names; download again: "
            + ", ".join(missing)
        )
    return [index.parent / name for name in names]


def _tensors_of(file: Path) -> list[CheckpointTensor]:
    return _safetensors(file) if file.suffix == ".safetensors" else _torch(file)


def _safetensors(file: Path) -> list[CheckpointTensor]:
    try:
        with safe_open(file, framework="numpy") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({error}). Delete it and download or save it again"
        ) from error
    return [CheckpointTensor(name, file, shape, _SafetensorsReader(file, name)) for name, shape in shapes.items()]


@dataclass(frozen=True)
class _SafetensorsReader:
    file: Path
    name: str

    def __call__(self) -> np.ndarray:
        # Opened for each tensor, which costs the parsing of the header and leaves nothing mapped.
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_tensor(self.name)


def _torch(file: Path) -> list[CheckpointTensor]:
    try:
        index = torch_pickle.read_index(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return [
        CheckpointTensor(name, file, tensor.shape, lambda tensor=tensor: torch_pickle.read_tensor(file, tensor))
        for name, tensor in index.items()
    ]
