"""grouped_matmul: groups of rows, each times a matrix of its own, as in a mixture of experts."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import check_shape
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quant_matmul import QuantizedWeight

_IMPLEMENTATIONS = {"reference": dispatch.Implementation(reference.grouped_matmul)}


def grouped_matmul(
    x: jax.Array, weight: jax.Array | QuantizedWeight, group_sizes: jax.Array, *, backend: str | None = None
) -> jax.Array:
    """Products of consecutive groups of rows with one matrix each (Gale et al., "MegaBlocks", MLSys 2023).

    Args:
      x: [M, I], the rows of group 0 first, then those of group 1, ...
      weight: [E, O, I], the matrix of each group in a checkpoint's orientation. Or E packed ones, as one
        QuantizedWeight whose arrays have a first axis E: `jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)`.
      group_sizes: i32[E], rows of each group, at most M together.

    Returns: [M, O] in x's dtype, zeros for rows past the last group's; sums in float32.

    Raises: ValueError naming the argument whose shape does not fit.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "M I", sizes)
    if isinstance(weight, QuantizedWeight):
        check_shape("weight.codes", weight.codes, "E R C words 128", sizes)
        if weight.in_features != sizes["I"]:
            raise ValueError(f"x must be [M, in_features={weight.in_features}], got shape {list(x.shape)}")
    else:
        check_shape("weight", weight, "E O I", sizes)
    check_shape("group_sizes", group_sizes, "E", sizes)
    return dispatch.run("grouped_matmul", _IMPLEMENTATIONS, backend, x, weight, group_sizes)
