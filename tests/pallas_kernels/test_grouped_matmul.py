"""grouped_matmul against a loop over groups in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, reference
from pallas_kernels.grouped_matmul.specs import SPECS
from pallas_kernels.quant_matmul import abstract, pack
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin
from tests.pallas_kernels.test_quant_matmul import canonical

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


PACKED = {
    "int4": dict(format="int4", group_size=32),
    "int4 zeros permuted": dict(format="int4", group_size=128, zeros="integer", permuted=True),
    "int8": dict(format="int8", group_size=-1),
    "fp8": dict(format="fp8", group_size=-1),
    "fp8 blocks": dict(format="fp8", group_size=128),
}


def packed_stack(num_experts, out, in_, *, format, group_size, zeros=None, permuted=False):
    """(the stacked QuantizedWeight, its values [E, out, in] in the order of the inputs)."""
    weights, values = [], []
    for expert in range(num_experts):
        codes, scales, zero, of_codes = canonical(expert, out, in_, format, group_size, zeros)
        order = np.random.default_rng(expert).permutation(in_) if permuted else np.arange(in_)
        weights.append(pack(codes, scales, zero, order if permuted else None, format=format, group_size=group_size))
        values.append(of_codes[:, np.argsort(order)])
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights), np.stack(values)


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_equal_a_loop_over_their_values(case):
    weight, values = packed_stack(5, 72, 200, **PACKED[case])
    sizes = [3, 0, 20, 1, 17]
    x = np.random.default_rng(0).standard_normal((sum(sizes) + 5, 200)).astype(np.float32)
    out = grouped_matmul(jnp.asarray(x), weight, jnp.asarray(sizes, jnp.int32))
    wanted = expected(x, values, sizes)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())


def test_packed_weights_are_dequantized_a_few_at_a_time(monkeypatch):
    size = 256 * 256 * 4  # of one, as float32
    monkeypatch.setattr(reference, "_COPY_BYTES", 2 * size)
    one = abstract(256, 256, format="int4", group_size=128)
    stack = jax.tree.map(lambda array: jax.ShapeDtypeStruct((64, *array.shape), array.dtype), one)
    rows, sizes = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(rows, stack, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * size


@needs_cuda_plugin
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.format], ids=lambda spec: spec.name)
def test_packed_weights_are_dequantized_a_few_at_a_time_on_an_h200(spec):
    options = dict(format=spec.format, group_size=spec.group_size, zeros=spec.zeros)
    one, E = abstract(spec.out_features, spec.in_features, **options), spec.num_experts
    stack = jax.tree.map(lambda array: jax.ShapeDtypeStruct((E, *array.shape), array.dtype), one)
    rows = jax.ShapeDtypeStruct((spec.num_rows, spec.in_features), jnp.bfloat16)
    compiled = compile_for_h200(grouped_matmul, rows, stack, jax.ShapeDtypeStruct((E,), jnp.int32))
    in_and_out = 2 * spec.num_rows * (spec.in_features + spec.out_features)
    copies = max(reference._COPY_BYTES, 2 * spec.out_features * spec.in_features)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.75 * copies + 2 * in_and_out


def test_packed_shapes_are_checked():
    weight, _ = packed_stack(2, 5, 32, format="int8", group_size=-1)
    with pytest.raises(ValueError, match=r"x must be .*in_features=32"):
        grouped_matmul(jnp.zeros((3, 4)), weight, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(jnp.zeros((3, 32)), weight, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"weight\.codes"):
        grouped_matmul(jnp.zeros((3, 32)), jax.tree.map(lambda array: array[0], weight), jnp.zeros(1, jnp.int32))
