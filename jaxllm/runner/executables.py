"""Executables: every program that the engine may run, compiled or loaded before the first request.

JAX compiles a function again, silently, for every new input shape. Here nothing is compiled silently: programs are
lowered and compiled by name, several at a time, through JAX's persistent cache; asking later for one that is not there
is an error in tests and a warning in production.
"""

import logging
import os
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
from tqdm import tqdm

logger = logging.getLogger(__name__)

on_late_compilation: Literal["warn", "raise"] = "warn"
"""What a compilation after warm-up does. The test suite sets "raise"."""


class LateCompilation(RuntimeError):
    """Something had to be compiled after warm-up."""


class Executables:
    """Compiled programs by key.

    Args:
      lower: key -> jax.stages.Lowered. Runs in one thread; the compilations run in several.
    """

    def __init__(self, lower: Callable[[Any], jax.stages.Lowered]) -> None:
        self._lower = lower
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self._warm = False

    def __getitem__(self, key: Hashable) -> jax.stages.Compiled:
        try:
            return self._compiled[key]
        except KeyError:
            return self._compile_late(key)

    def __len__(self) -> int:
        return len(self._compiled)

    def warm_up(self, keys: list[Hashable], progress: bool) -> float:
        """Compiles, or loads from the persistent cache, all of `keys`; returns the seconds it took."""
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
            bar = tqdm(total=len(keys), desc="Compiling", unit="program", disable=not progress, dynamic_ncols=True)

            def compile_one(key: Hashable, lowered: jax.stages.Lowered) -> None:
                self._compiled[key] = lowered.compile()
                bar.update()

            jobs = [pool.submit(compile_one, key, self._lower(key)) for key in keys if key not in self._compiled]
            for job in jobs:
                job.result()
            bar.close()
        self._warm = True
        return time.perf_counter() - start

    def _compile_late(self, key: Hashable) -> jax.stages.Compiled:
        if self._warm:
            if on_late_compilation == "raise":
                raise LateCompilation(f"{key} was not compiled at start-up")
            logger.warning("compiling %s after warm-up: this step will take seconds", key)
        compiled = self._compiled[key] = self._lower(key).compile()
        return compiled


def use_persistent_cache() -> None:
    """Turns on JAX's compilation cache on disk, unless the user has configured one (or none) already.

    Its folder is $JAXLLM_CACHE_DIR/xla, else ~/.cache/jaxllm/xla.
    """
    if jax.config.jax_compilation_cache_dir is not None or os.environ.get("JAX_COMPILATION_CACHE_DIR") is not None:
        return
    root = os.environ.get("JAXLLM_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "jaxllm")
    jax.config.update("jax_compilation_cache_dir", os.path.join(root, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
