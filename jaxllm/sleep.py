"""Sleep mode: an engine frees its device memory for a while, for other work of the same process.

Freed memory goes back to JAX's allocator, which keeps it for this process: other processes get it only where JAX runs
with XLA_PYTHON_CLIENT_ALLOCATOR=platform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxllm.runner.model_runner import ModelRunner

TAGS = frozenset({"weights", "kv_cache"})


class SleepMode:
    """Frees and restores what a runner holds on the device. Its owner sees to it that no request is unfinished.

    Args:
      reload: reads the weights again; None where they came from memory.

    Attributes:
      missing: which of TAGS are not on the device.
    """

    def __init__(self, runner: ModelRunner, reload: Callable[[], Any] | None) -> None:
        self._runner, self._reload = runner, reload
        self._kept: Any = None  # the weights in host memory
        self._shardings: Any = None
        self.missing: frozenset[str] = frozenset()

    def sleep(self, level: int) -> None:
        """Frees what is still on the device. Level 1 keeps the weights in host memory, level 2 drops them.

        Raises: ValueError for another level, or for level 2 with weights that cannot be read again.
        """
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        if level == 2 and self._reload is None:
            raise ValueError(
                "level=2 drops the weights, and these came from memory, not from a checkpoint: use level=1"
            )
        runner = self._runner
        if "weights" not in self.missing:
            self._shardings = jax.tree.map(lambda x: x.sharding, runner.params)
            self._kept = jax.device_get(runner.params) if level == 1 else None
            runner.params = None
        elif level == 2:
            self._kept = None
        if "kv_cache" not in self.missing:
            runner.release()
        self.missing = TAGS

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Restores the weights, the KV pages (empty) or both; what is there already stays as it is.

        Raises: ValueError for an unknown tag.
        """
        wanted = TAGS if tags is None else frozenset(tags)
        if wanted - TAGS:
            raise ValueError(f"tags must be among {sorted(TAGS)}, got {sorted(wanted - TAGS)}")
        if "weights" in wanted & self.missing:
            params = self._kept if self._kept is not None else self._reload()
            self._runner.params = jax.device_put(params, self._shardings)
            self._kept = self._shardings = None
        if "kv_cache" in wanted & self.missing:
            self._runner.reset()
        self.missing -= wanted


def check_sleep_mode(mode: str | None) -> None:
    """Raises ValueError unless it is one of vLLM's that is honoured, or None."""
    if mode not in (None, "abort"):
        raise ValueError(f'mode must be "abort" (unfinished requests) or None (there are none), got {mode!r}')
