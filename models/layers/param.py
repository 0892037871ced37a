"""A weight, declared once: shape, dtype, logical axes, initializer and named parts.

Random initialization, sharding and checkpoint checks are all derived from this declaration; nothing else in the
package repeats a weight's shape.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """What a weight is. `axes` names each dimension ("vocab", "embed", ...; None: never sharded).

    `parts` names consecutive slices of axis 0, `((name, size), ...)`, where a weight is several of the checkpoint's
    tensors merged into one (q, k and v; gate and up). It is empty for any other weight.

    A `stacked` weight has one matrix an expert: axis 0 counts them, each is a tensor of the checkpoint, and `parts`
    names slices of axis 1.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    initializer: Initializer
    parts: tuple[tuple[str, int], ...] = ()
    stacked: bool = False

    def __post_init__(self):
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes={self.axes} must name each dimension of shape={self.shape}")
        if self.parts and sum(size for _, size in self.parts) != self.shape[self.stacked]:
            raise ValueError(f"parts={self.parts} must add up to dimension {int(self.stacked)} of shape={self.shape}")

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def param(
    shape: tuple[int, ...],
    dtype,
    axes: tuple[str | None, ...],
    initializer: Initializer,
    parts: Mapping[str, int] | None = None,
    stacked: bool = False,
) -> nnx.Param:
    """A weight of an NNX module. It holds no array, only its declaration: arrays are joined to it at trace time."""
    spec = ParamSpec(tuple(shape), jnp.dtype(dtype), tuple(axes), initializer, tuple((parts or {}).items()), stacked)
    return nnx.Param(spec.abstract, spec=spec)


@functools.cache
def normal(stddev: float) -> Initializer:
    """Normal with mean 0. Cached, so that equal weights share one compiled initializer."""
    return jax.nn.initializers.normal(stddev)


ones: Initializer = jax.nn.initializers.ones
zeros: Initializer = jax.nn.initializers.zeros
