"""grouped_matmul against a loop over groups in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, reference

GROUPS = {
    "even": [4, 4, 4],
    "empty ones": [0, 7, 0, 0, 33, 0],
    "one": [40],
    "one row each": [1] * 50,
    "rows left over": [3, 0, 20, 1],
    "no rows": [0, 0],
    "large": [300, 1, 129, 128],
}


def expected(x, weight, group_sizes):
    out, start = np.zeros((len(x), weight.shape[1])), 0
    for matrix, size in zip(weight, group_sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ matrix.T
        start += size
    return out


@pytest.mark.parametrize("copy_bytes", [2**20, 1])  # 1: a block at a time
@pytest.mark.parametrize("case", GROUPS)
def test_equals_a_loop(case, copy_bytes, monkeypatch):
    monkeypatch.setattr(reference, "_COPY_BYTES", copy_bytes)
    random = np.random.default_rng(0)
    sizes = GROUPS[case]
    x, weight = random.standard_normal((sum(sizes) + 5, 12)), random.standard_normal((len(sizes), 9, 12))
    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray(sizes, jnp.int32))
    reference.grouped_matmul.clear_cache()
    np.testing.assert_allclose(grouped_matmul(*arrays), expected(x, weight, sizes), atol=1e-4)


def test_half_precision_is_returned_and_rounded_once():
    x, weight = jnp.ones((3, 512), jnp.bfloat16), jnp.full((2, 1, 512), 1 / 512, jnp.bfloat16)
    out = grouped_matmul(x, weight, jnp.asarray([1, 2], jnp.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), 1)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="weight"):
        grouped_matmul(jnp.zeros((3, 4)), jnp.zeros((2, 5, 6)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(jnp.zeros((3, 4)), jnp.zeros((2, 5, 4)), jnp.zeros(3, jnp.int32))
