"""The one module that imports Pallas Mosaic GPU: what differs between JAX versions and devices is decided here.

Kernels take `plgpu` and `pl` from here. It knows no op.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["kernel", "num_multiprocessors", "pl", "plgpu", "unsupported"]


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


def kernel(body, *, interpret: bool = False, **options):
    """plgpu.kernel; `interpret` runs it on a CPU, block after block in the order of the grid."""
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams()
    return plgpu.kernel(body, **options)
