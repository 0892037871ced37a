"""grouped_matmul in plain JAX: the groups are cut into blocks of rows, and each block meets its group's matrix.

On a GPU, XLA (jax 0.11) turns `jax.lax.ragged_dot` into a dense product of every row with every group's matrix, and
copies the weights into another orientation before. Here the work is that of the rows there are. What it costs is a copy
of the matrices that a batch of blocks needs, which is where packed ones are dequantized; batches are small enough for
the copies to fit anywhere.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import QuantizedWeight
from pallas_kernels.quant_matmul.reference import quant_matmul

_COPY_BYTES = 128 * 2**20  # of matrices, at once
_MIN_BLOCK, _MAX_BLOCK = 16, 128  # rows


@jax.jit
def grouped_matmul(x, weight, group_sizes):
    """See pallas_kernels.grouped_matmul."""
    num_rows, out_size = x.shape[0], weight.shape[-2]
    groups, rows = _blocks(group_sizes, num_rows)
    matrix_bytes = weight.shape[-2] * weight.shape[-1] * x.dtype.itemsize

    def product(block):
        group, rows = block
        matrix = jax.tree.map(lambda stacked: stacked[group], weight)
        return _product(x.at[rows].get(mode="clip"), matrix)

    blocks = jax.lax.map(product, (groups, rows), batch_size=max(1, min(len(groups), _COPY_BYTES // matrix_bytes)))
    return jnp.zeros((num_rows, out_size), x.dtype).at[rows].set(blocks, mode="drop")


def _product(x, matrix):
    """[block, I] x [O, I] -> [block, O]."""
    if isinstance(matrix, QuantizedWeight):
        return quant_matmul(x, matrix, activation=None, out_dtype=x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("bi,oi->bo", x, matrix, precision=precision, preferred_element_type=x.dtype)


def _blocks(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """(the group i32[B] and the rows i32[B, block] of each block); a row of num_rows is none.

    Groups [5, 0, 2] in blocks of 4 are the blocks (0, rows 0 1 2 3), (0, row 4), (2, rows 5 6).
    """
    num_groups = len(group_sizes)
    block = _MIN_BLOCK
    while block < min(_MAX_BLOCK, num_rows // num_groups):
        block *= 2
    num_blocks = min(num_rows, num_rows // block + num_groups)  # a group's last block may be its only one, of one row
    blocks_end = jnp.cumsum(-(-group_sizes // block), dtype=jnp.int32)
    rows_end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(blocks_end, index, side="right"), num_groups - 1).astype(jnp.int32)
    first_row = rows_end[group] - group_sizes[group]
    first_block = blocks_end[group] - (-(-group_sizes[group] // block))
    rows = (first_row + (index - first_block) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
    return group, jnp.where(rows < rows_end[group][:, None], rows, num_rows)
