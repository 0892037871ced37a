"""The one module that imports Pallas Mosaic GPU: what differs between JAX versions and devices is decided here.

Kernels take `plgpu` and `pl` from here. It knows no op.
"""

import functools
from collections.abc import Hashable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["kernel", "num_multiprocessors", "pl", "plgpu", "registers_of_words", "unsupported"]


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


_exported: dict[Hashable, jax.export.Exported] = {}


def registers_of_words(words: jax.Array, ptx: str, inputs: int, columns: int, dtype) -> list[jax.Array]:
    """Makes left operands of wgmma from 32-bit words that already lie with the threads that need them.

    A register holds two values of 16 bits or four of 8 bits that are neighbours in a row. A thread's registers go by
    columns, 8 or 16 a register, then by row / 8.

    Args:
      words: i32[n, 128] in the layout WG_STRIDED with vec_size 4.
      ptx: instructions that turn words $4... into registers $0 to $3. "" takes a word as a register.
      inputs: how many words it takes.
      columns: of each array.
      dtype: of 16 or 8 bits.

    Returns: arrays [64, columns] in the layout WGMMA or WGMMA_8BIT, as many as the registers fill.
    """
    values = 4 // jnp.dtype(dtype).itemsize
    layout = plgpu.Layout.WGMMA if values == 2 else plgpu.Layout.WGMMA_8BIT
    per_thread = words.size // 128
    registers = per_thread if not ptx else per_thread // inputs * 4
    count = registers * 128 * values // (64 * columns)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_STRIDED(words.shape, vec_size=4),),
        return_type=[plgpu.ShapeDtypeStruct((64, columns), dtype, layout=layout)] * count,
    )
    def convert(_, words):
        vectors = words.registers.flat
        flat = [vector.extract(v, [], [i]) for v in vectors for i in range(4)]
        if ptx:
            flat = [r for i in range(0, len(flat), inputs) for r in _four_registers(ptx, flat[i : i + inputs])]
        register_type = ir.VectorType.get((values,), mgpu.utils.dtype_to_ir_type(dtype))
        flat = [mgpu.utils.bitcast(r, register_type) for r in flat]
        mgpu_layout = layout.to_mgpu()
        shape = mgpu_layout.registers_shape((64, columns))
        each = len(flat) // count
        return [
            mgpu.FragmentedArray(
                _registers=np.array(flat[i * each : (i + 1) * each], dtype=object).reshape(shape),
                _layout=mgpu_layout,
                _is_signed=mgpu.utils.is_signed(dtype),
            )
            for i in range(count)
        ]

    return convert(words)


def _four_registers(ptx, words):
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=&r"] * 4 + ["r"] * len(words))
    struct = llvm.inline_asm(llvm.StructType.get_literal([i32] * 4), words, "{" + ptx + "}", constraints)
    return [llvm.extractvalue(i32, struct, [i]) for i in range(4)]
