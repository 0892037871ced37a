"""Executables: every program that the engine may run, compiled or loaded before the first request.

JAX compiles a function again, silently, for every new input shape. Here nothing is compiled silently: programs are read
from a cache or compiled by name, several at a time; asking later for one that is not there is an error in tests and a
warning in production.
"""

import contextlib
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
from tqdm import tqdm

from jaxllm.runner.program_cache import ProgramCache

logger = logging.getLogger(__name__)

on_late_compilation: Literal["warn", "raise"] = "warn"
"""What a compilation after warm-up does. The test suite sets "raise"."""


class LateCompilation(RuntimeError):
    """Something had to be compiled after warm-up."""


class Executables:
    """Compiled programs by key.

    Args:
      lower: key -> jax.stages.Lowered. Runs in one thread; the compilations run in several.
      cache: where programs are kept between processes; none: nowhere.
    """

    def __init__(self, lower: Callable[[Any], jax.stages.Lowered], cache: ProgramCache | None = None) -> None:
        self._lower = lower
        self._cache = cache
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self._warm = False

    def __getitem__(self, key: Hashable) -> jax.stages.Compiled:
        try:
            return self._compiled[key]
        except KeyError:
            return self._compile_late(key)

    def __len__(self) -> int:
        return len(self._compiled)

    def adopt(self, others: "Executables", keys: list[Hashable]) -> None:
        """Takes those of the others' programs that have one of `keys`, which mean the same here."""
        self._compiled |= {key: others._compiled[key] for key in keys if key in others._compiled}

    def warm_up(self, keys: list[Hashable], progress: bool) -> float:
        """Loads or compiles all of `keys`; returns the seconds it took."""
        start = time.perf_counter()
        keys = [key for key in keys if key not in self._compiled]
        bar = tqdm(total=len(keys), desc="Compiling", unit="program", disable=not progress, dynamic_ncols=True)
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16), initializer=_give_way) as pool:
            found = list(pool.map(self._load, keys))
            missing = [key for key, program in zip(keys, found, strict=True) if program is None]
            bar.update(len(keys) - len(missing))

            def compile_one(key: Hashable, lowered: jax.stages.Lowered) -> None:
                self._compile(key, lowered)
                bar.update()

            for job in [pool.submit(compile_one, key, self._lowered(key)) for key in missing]:
                job.result()
        bar.close()
        self._warm = True
        return time.perf_counter() - start

    def _load(self, key: Hashable) -> jax.stages.Compiled | None:
        program = None if self._cache is None else self._cache.load(key)
        if program is not None:
            self._compiled[key] = program
        return program

    def _lowered(self, key: Hashable) -> jax.stages.Lowered:
        start = time.perf_counter()
        lowered = self._lower(key)
        logger.debug("%s: traced and lowered in %.2f s", key, time.perf_counter() - start)
        return lowered

    def _compile(self, key: Hashable, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        start = time.perf_counter()
        compiled = self._compiled[key] = lowered.compile()
        logger.debug("%s: compiled in %.2f s", key, time.perf_counter() - start)
        if self._cache is not None:
            self._cache.save(key, compiled)
        return compiled

    def _compile_late(self, key: Hashable) -> jax.stages.Compiled:
        if self._warm:
            if on_late_compilation == "raise":
                raise LateCompilation(f"{key} was not compiled at start-up")
            logger.warning("compiling %s after warm-up: this step will take seconds", key)
        return self._load(key) or self._compile(key, self._lowered(key))


def _give_way() -> None:
    """Lowers this thread's priority. Compilers would crowd out the one thread that has work for them."""
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        with contextlib.suppress(OSError):  # it may be lower already, and must not be raised
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def use_persistent_cache() -> pathlib.Path | None:
    """Turns on JAX's compilation cache on disk, unless the user has configured one (or none) already.

    Its folder is $JAXLLM_CACHE_DIR/xla, else ~/.cache/jaxllm/xla. Returns the folder in use; None if there is none.
    """
    if jax.config.jax_compilation_cache_dir is None and os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
        root = os.environ.get("JAXLLM_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "jaxllm")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    folder = jax.config.jax_compilation_cache_dir
    return pathlib.Path(folder) if folder and jax.config.jax_enable_compilation_cache else None
