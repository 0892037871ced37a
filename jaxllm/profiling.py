"""Profiles by JAX's profiler, which is the whole process's: one is taken at a time."""

from __future__ import annotations

import os


def start(folder: str | None) -> None:
    """Records until `stop`, into `folder` or, for None, the environment's JAXLLM_PROFILER_DIR.

    Raises: ValueError if neither is set; RuntimeError if a profile is being taken already.
    """
    import jax

    folder = folder or os.environ.get("JAXLLM_PROFILER_DIR")
    if not folder:
        raise ValueError("no folder for profiles: set profiler_dir=... or JAXLLM_PROFILER_DIR")
    jax.profiler.start_trace(folder)


def stop() -> None:
    """Ends the recording and writes it. Raises RuntimeError if there is none."""
    import jax

    jax.profiler.stop_trace()
