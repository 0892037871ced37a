"""Which implementation of an op runs: the one rule, for all ops.

An op lists its implementations, best first. On a device, the first that says it supports the call is taken. An
implementation is passed over for one reason alone, that it does not support the call; an error in a chosen one is an
error. When none is left, the message holds every reason.

The environment variable PALLAS_KERNELS_BACKEND names one for all ops that have it, to compare and to find faults.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PALLAS_KERNELS_BACKEND"
BACKENDS = ("mosaic_gpu", "interpret", "reference")


class UnsupportedError(NotImplementedError):
    """No implementation supports the call; says why not, one by one."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      function: takes the op's arguments.
      supported: the op's arguments -> None, or the reason why this implementation cannot take them.
      platforms: where it may be picked unasked: "cpu", "gpu".
    """

    function: Callable[..., Any]
    supported: Callable[..., str | None] = lambda *args, **kwargs: None
    platforms: tuple[str, ...] = ("cpu", "gpu")


def run(op: str, implementations: Mapping[str, Implementation], backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs `op` with the implementation for this platform, or with the one that `backend` (or the environment) names.

    Raises: ValueError for an unknown backend; UnsupportedError if no implementation takes the call.
    """
    if backend is not None and backend not in implementations:
        raise ValueError(f"backend must be one of {', '.join(implementations)} for {op}, got {backend!r}")
    backend = backend or _backend_of_environment(implementations)
    platform = jax.default_backend()
    reasons = []
    for name, one in implementations.items():
        if backend is not None and name != backend:
            continue
        if backend is None and platform not in one.platforms:
            reasons.append(f"{name}: not for platform {platform}")
        elif (reason := one.supported(*args, **kwargs)) is not None:
            reasons.append(f"{name}: {reason}")
        else:
            if reasons and platform == "gpu":
                _tell_once(op, name, "; ".join(reasons))
            return one.function(*args, **kwargs)
    raise UnsupportedError(f"nothing can run {op}: " + "; ".join(reasons))


def _backend_of_environment(implementations: Mapping[str, Implementation]) -> str | None:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {wanted!r}")
    return wanted if wanted in implementations else None


@functools.cache
def _tell_once(op: str, name: str, reasons: str) -> None:
    logger.warning("%s runs as %s: %s", op, name, reasons)
