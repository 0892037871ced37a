"""Reads `pytorch_model.bin` without PyTorch, and without running what a pickle asks to run.

A file written by torch.save (PyTorch 1.6 and newer) is a zip archive: a pickle that describes tensors, and one entry of
raw bytes per storage. The unpickler here can build tensors and ordered dicts and nothing else; any other global is
refused by name. Tensors stay descriptions until they are read, one at a time.
"""

import collections
import contextlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# The first bytes of the format before PyTorch 1.6: a pickled magic number.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class UnsafePickleError(ValueError):
    """The pickle asks for something other than tensors."""


@dataclass(frozen=True)
class Storage:
    """The bytes of one zip entry, as numbers."""

    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class TorchTensor:
    """A view of a storage that has not been read: `strides` and `offset` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_index(path: Path) -> dict[str, TorchTensor]:
    """What a file holds: name -> description. No tensor data is read.

    Raises: UnsafePickleError if it asks for anything but tensors, naming it; ValueError if it is truncated, corrupt, in
    the format before PyTorch 1.6, or holds something besides a flat dict of tensors.
    """
    with _open(path) as archive:
        root = _root(archive, path)
        byte_order = f"{root}/byteorder"
        if byte_order in archive.namelist() and _read(archive, path, byte_order, "byteorder").strip() != b"little":
            raise ValueError(f"{path} was written on a big-endian machine, which is not supported")
        pickled = _read(archive, path, f"{root}/data.pkl", "data.pkl")
    try:
        loaded = _Unpickler(io.BytesIO(pickled), path).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise ValueError(f"{path} is corrupt ({error}); download or save it again") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; expected a dict of tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}; expected a tensor under a name")
    return dict(loaded)


def read_tensor(path: Path, tensor: TorchTensor) -> np.ndarray:
    """The tensor's values, contiguous. Reads its storage, checking the archive's checksum.

    Raises: ValueError if the file is damaged, or the tensor lies outside its storage.
    """
    storage = tensor.storage
    with _open(path) as archive:
        data = _read(archive, path, f"{_root(archive, path)}/data/{storage.key}", f"storage {storage.key}")
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, storage.dtype)
    values = np.frombuffer(data, dtype=storage.dtype, count=len(data) // storage.dtype.itemsize)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(values):
        raise ValueError(
            f"{path} is corrupt (a tensor reaches element {last} of storage {storage.key}, of {len(values)})"
        )
    strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)


def _open(path: Path) -> zipfile.ZipFile:
    """Raises: FileNotFoundError or PermissionError if it cannot be opened; ValueError if it is no sound archive."""
    try:
        return zipfile.ZipFile(path)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged directory raises OSError, UnicodeDecodeError, NotImplementedError, ...
        if _is_legacy(path):
            raise ValueError(
                f"{path} is in the format of PyTorch before 1.6. Convert it where PyTorch is installed: "
                "torch.save(torch.load(path, weights_only=True), path), or save it as safetensors"
            ) from error
        raise ValueError(
            f"{path} is truncated, corrupt or not from torch.save ({error}); download or save it again"
        ) from error


def _is_legacy(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(_LEGACY_START)) == _LEGACY_START
    return False


def _read(archive: zipfile.ZipFile, path: Path, name: str, what: str) -> bytes:
    """The bytes of an entry; `what` names it in the error.

    Raises: ValueError if it is missing or damaged.
    """
    try:
        return archive.read(name)
    except MemoryError:
        raise
    except Exception as error:  # damage raises BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, ...
        raise ValueError(f"{path} is corrupt ({what}: {error}); download or save it again") from error


def _root(archive: zipfile.ZipFile, path: Path) -> str:
    for name in archive.namelist():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name.removesuffix("/data.pkl")
    raise ValueError(f"{path} is a zip archive without data.pkl: not written by torch.save")


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> TorchTensor:
    """torch._utils._rebuild_tensor_v2. The file's numbers are checked here, before they address memory."""
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    valid = all(type(number) is int and number >= 0 for number in numbers) and len(shape) == len(strides)
    if not isinstance(storage, Storage) or not valid:
        raise ValueError(f"bad tensor: storage={storage!r}, offset={offset!r}, shape={shape!r}, strides={strides!r}")
    return TorchTensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad=False, hooks=None) -> TorchTensor:
    """torch._utils._rebuild_parameter."""
    if not isinstance(tensor, TorchTensor):
        raise ValueError(f"bad parameter: {tensor!r} is not a tensor")
    return tensor


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


_GLOBALS: dict[tuple[str, str], Callable | _StorageType] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise UnsafePickleError(
                f"{self.path} asks for {module}.{name}, which is not part of a tensor; it was not run. "
                "Load only the weights of a source you trust, as safetensors if it offers them"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str() as key, _, int() as numel):
                return Storage(key, dtype, numel)
        raise ValueError(f"bad storage reference {pid!r}")
