"""The tensors of a checkpoint folder, whichever files hold them: safetensors or .bin, one file or shards with an index.

It knows file formats and no model. Headers are read at once, values one tensor at a time.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
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

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with everything found wrong with it."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor on disk: what its file says it is, and how to read it.

    What `read` gives may be a view of the file, which must not be written to nor outlive a change of the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # "bfloat16", ...
    read: Callable[[], np.ndarray]


def list_tensors(folder: Path) -> list[CheckpointTensor]:
    """All tensors of a folder, file by file, in the order in which they lie in it.

    Raises: CheckpointError for no weights, missing shards (all of them named), or a damaged file.
    """
    return [tensor for file in weight_files(Path(folder)) for tensor in list_tensors_of(file)]


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


def list_tensors_of(file: Path) -> list[CheckpointTensor]:
    """The tensors of one file, as `list_tensors` lists them."""
    return _safetensors(file) if file.suffix == ".safetensors" else _torch(file)


def _safetensors(file: Path) -> list[CheckpointTensor]:
    try:
        with safe_open(file, framework="numpy") as opened:  # checks the header against the file's size
            names = opened.offset_keys()
        with open(file, "rb") as opened:
            header_size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({error}). Delete it and download or save it again"
        ) from error
    return [_safetensors_entry(file, name, header[name], 8 + header_size) for name in names]


def _safetensors_entry(file: Path, name: str, entry: dict, data_start: int) -> CheckpointTensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        allowed = ", ".join(_SAFETENSORS_DTYPES)
        raise CheckpointError(
            f"{name} in {file} has dtype {entry['dtype']}, which is not supported; allowed: {allowed}"
        )
    dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    reader = _MappedReader(file, data_start + entry["data_offsets"][0], shape, dtype)
    return CheckpointTensor(name, file, shape, dtype.name, reader)


@dataclass(frozen=True)
class _MappedReader:
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        # Mapped for each tensor, so that no more of the file counts as ours than is being read.
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        # As bytes: a tensor need not lie at a multiple of its item's size.
        size = math.prod(self.shape) * self.dtype.itemsize
        data = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def _torch(file: Path) -> list[CheckpointTensor]:
    try:
        index = torch_pickle.read_index(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return [
        CheckpointTensor(
            name, file, tensor.shape, tensor.storage.dtype.name, partial(torch_pickle.read_tensor, file, tensor)
        )
        for name, tensor in index.items()
    ]
