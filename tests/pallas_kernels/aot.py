"""Compiles a function for an H200 on a machine without a GPU, where jax's CUDA plugin is installed."""

import functools
import pathlib

import jax
import pytest
from jax.experimental import topologies


@functools.cache
def _mesh():
    # As XLA itself describes such a card.
    config = (pathlib.Path(__file__).parent / "h200_target_config.pbtxt").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
        return topologies.make_mesh(topology, (1,), ("d",))
    except Exception as error:  # no plugin, or one of another jax
        return error


def compile_for_h200(fn, *abstract_args) -> jax.stages.Compiled:
    """`fn` of arguments of shapes like these (None where there is none), compiled. Skips the test without a plugin."""
    mesh = _mesh()
    if isinstance(mesh, Exception):
        pytest.skip(f"jax cannot compile for CUDA here: {mesh}"[:200])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*args).compile()
