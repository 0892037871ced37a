"""Compiles for an H200 on a machine without a GPU: XLA, Mosaic and ptxas run, nothing is executed.

The target description in tests/data is XLA's own, written on such a card. Needs jax's CUDA plugin wheels.
"""

import functools
import importlib.util
import pathlib
import re

import jax
import pytest
from jax.experimental import topologies

from pallas_kernels import mosaic

TARGET = pathlib.Path(__file__).parent.parent / "data" / "h200_target_config.pbtxt"

needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or mosaic.unsupported(interpret=True) is not None,
    reason="needs jax 0.11 with jax-cuda13-plugin and jax-cuda13-pjrt",
)


@functools.cache
def _mesh():
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("d",))


def compile_for_h200(function, *args, **jit_options) -> jax.stages.Compiled:
    """`function` of arguments of shapes and dtypes like these, compiled; `jit_options` are jax.jit's."""
    sharding = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(_mesh().abstract_mesh):
        return jax.jit(function, **jit_options).lower(*args).compile()


def registers_and_spills(ptxas_output: str) -> list[tuple[int, int]]:
    """For each kernel in what ptxas printed (MOSAIC_GPU_DUMP_PTXAS=1): registers a thread, bytes spilled."""
    registers = re.findall(r"Used (\d+) registers", ptxas_output)
    spills = re.findall(r"bytes stack frame, (\d+) bytes spill stores", ptxas_output)
    return [(int(used), int(spilled)) for used, spilled in zip(registers, spills, strict=True)]
