"""Pallas Mosaic GPU as kernels use it: what differs between JAX versions and devices is decided here.

Kernels take `plgpu` and `pl` from here. It knows no op.
"""

import functools
from collections.abc import Hashable

import jax
import jax.export
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["SHARED_MEMORY", "kernel", "num_multiprocessors", "pl", "plgpu", "store", "unsupported"]

SHARED_MEMORY = 227 * 1024  # bytes of a Hopper multiprocessor that CTAs can have


def unsupported(interpret: bool = False) -> str | None:
    """Why no Mosaic GPU kernel of ours can run here, or None."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"jax {jax.__version__}, at least 0.11 is needed"
    if interpret:
        return None
    # Nothing but the name on other platforms: "9.0" on a Hopper GPU.
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    if capability not in ("9.0", "9.0a"):
        return f"compute capability {capability}, 9.0 is needed"
    return None


def num_multiprocessors() -> int:
    """Of the default device; an H100's or H200's where that is no GPU (compiling for one elsewhere)."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def kernel(body: functools.partial, *, interpret: bool = False, in_place: bool = False, **options):
    """plgpu.kernel; `interpret` runs it on a CPU, block after block in the order of the grid.

    Making code of a kernel takes seconds of Python, and JAX does it again in each program that calls it. Here it is
    done once for each `body` (a function with hashable arguments, which decide the options) and shapes; but not for one
    that works `in_place`, on references (jax.new_ref) among its arguments, which cannot be exported.
    """
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams()
    if interpret or in_place:
        return plgpu.kernel(body, **options)

    def call(*args):
        key = body.func, body.args, tuple((x.shape, x.dtype) for x in args)
        if key not in _exported:
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
            checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
            function = jax.jit(plgpu.kernel(body, **options))
            _exported[key] = jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(*shapes)
        return _exported[key].call(*args)

    return call


def store(ref, value) -> None:
    """ref[...] = value, also where no wide instructions fit the layout: since JAX 0.12 one must say so."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


_exported: dict[Hashable, jax.export.Exported] = {}
