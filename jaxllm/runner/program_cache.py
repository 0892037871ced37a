"""Compiled programs on disk, found without tracing anything.

JAX's own compilation cache spares the compiler, but its keys are made from the lowered program: to ask it, each program
must be traced and lowered first, a second or two each, one after the other. Here the key is made from what a program is
made of (our sources, versions, device, model, shapes), so that a start with a full cache only reads files.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import pathlib
import pickle
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

_KEEP_SECONDS = 30 * 24 * 3600  # after its last use
_PACKAGES = ("jaxllm", "jaxllm.models", "pallas_kernels")


class ProgramCache:
    """Serialized executables in a folder, one file each.

    Args:
      folder: made when the first program is saved.
      ingredients: whatever the programs depend on besides sources, versions and device; by its `repr`.
      classes: classes of other packages whose source the programs depend on (a model registered from outside).
    """

    def __init__(self, folder: pathlib.Path, ingredients: Any, classes: Iterable[type] = ()) -> None:
        self.folder = folder
        self._fingerprint = "\n".join([_of_sources(classes), _of_environment(), repr(ingredients)])

    def load(self, key: Any) -> jax.stages.Compiled | None:
        """The program of that key; None if there is none, or none that can be read."""
        path = self._path(key)
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
            with contextlib.suppress(OSError):  # a read-only folder, or another user's file: as good as any
                os.utime(path)  # it is in use
            return program
        except FileNotFoundError:
            return None
        except Exception as error:  # a file cut short, or a format that JAX gave up: as good as none
            logger.warning("%s cannot be read and is made again: %s", path, error)
            return None

    def save(self, key: Any, compiled: jax.stages.Compiled) -> None:
        """Keeps a program. A failure (a full disk, say) costs the next start time, and is only reported."""
        try:
            data = pickle.dumps(serialize_executable.serialize(compiled))
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._path(key), data)
            self._remove_old()
        except Exception as error:
            logger.warning("%s was not kept in %s: %s", key, self.folder, error)

    def _remove_old(self) -> None:
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread or process was first
                if time.time() - path.stat().st_mtime > _KEEP_SECONDS:
                    path.unlink()

    def _path(self, key: Any) -> pathlib.Path:
        return self.folder / hashlib.sha256(f"{key!r}\n{self._fingerprint}".encode()).hexdigest()


def _write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file whole or not at all: no reader ever meets half of it, and a failure leaves nothing behind."""
    with contextlib.ExitStack() as failure:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            failure.callback(os.unlink, file.name)
            file.write(data)
        os.replace(file.name, path)
        failure.pop_all()  # there was none


def _of_sources(classes: Iterable[type]) -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        folder = pathlib.Path(sys.modules[package].__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    for one in classes:
        digest.update(inspect.getsource(sys.modules[one.__module__]).encode())
    return digest.hexdigest()


def _of_environment() -> str:
    device = jax.devices()[0]
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    variables = ("XLA_FLAGS", "PALLAS_KERNELS_BACKEND")
    return json.dumps(
        {
            "versions": [jax.__version__, jax.lib.__version__, device.client.platform_version, sys.version],
            "device": [device.device_kind, getattr(device, "compute_capability", None), jax.device_count()],
            "config": [str(getattr(jax.config, name)) for name in names],
            "environment": [os.environ.get(name) for name in variables],
        }
    )
