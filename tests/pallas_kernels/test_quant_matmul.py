"""quant_matmul's reference and the packing of weights against NumPy, in canonical form."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quant_matmul import abstract, concatenate, dequantize, pack, quant_matmul
from pallas_kernels.quant_matmul.weight import KINDS, unpack_codes


def random_codes(rng, shape, format):
    if format == "fp8":
        return rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    low, high = {"int4": (0, 16), "int8": (-128, 128)}[format]
    return rng.integers(low, high, shape).astype(KINDS[format].dtype)


def canonical(seed, out, in_, format, group_size, zeros=None, dtype=np.float32):
    """Codes, scales and zeros (None, "integer", "float"), and their values as NumPy computes them."""
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-in_ // group_size)
    width = in_ if group_size == -1 else group_size
    codes = random_codes(rng, (out, in_), format)
    scales = rng.uniform(0.5, 2, (out, groups)).astype(dtype)
    zero = None
    if zeros is not None:
        zero = rng.integers(0, 17, (out, groups)).astype(np.float32)
        zero = zero + rng.uniform(0, 1, zero.shape).astype(np.float32) if zeros == "float" else zero

    def spread(values):
        return np.repeat(values.astype(np.float32), width, axis=1)[:, :in_]

    middle = KINDS[format].middle if zero is None else spread(zero)
    return codes, scales, zero, (codes.astype(np.float32) - middle) * spread(scales)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    out=st.sampled_from([1, 40, 64, 130]),
    in_=st.sampled_from([32, 128, 200, 384]),
    format=st.sampled_from(["int4", "int8", "fp8"]),
    group_size=st.sampled_from([-1, 16, 32, 64, 128, 256]),
    zeros=st.sampled_from([None, "integer", "float"]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_values_and_codes_come_back(seed, out, in_, format, group_size, zeros, dtype):
    codes, scales, zero, values = canonical(seed, out, in_, format, group_size, zeros, dtype)
    weight = pack(codes, scales, zero, format=format, group_size=group_size)
    assert weight.shape == (out, in_) and weight.scales.dtype == dtype
    np.testing.assert_array_equal(np.asarray(unpack_codes(weight)), codes)
    np.testing.assert_allclose(np.asarray(dequantize(weight)), values, rtol=1e-6)


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("group_size", [-1, 32, 128, 256])
@pytest.mark.parametrize("zeros", [None, "integer"])
def test_product(format, group_size, zeros):
    codes, scales, zero, values = canonical(0, 72, 300, format, group_size, zeros)
    permutation = np.random.default_rng(1).permutation(300)
    x = np.random.default_rng(2).normal(size=(2, 3, 300)).astype(np.float32)
    weight = pack(codes, scales, zero, permutation, format=format, group_size=group_size)
    out = jax.jit(quant_matmul)(x, weight)
    np.testing.assert_allclose(out, x[..., permutation] @ values.T, rtol=1e-4, atol=1e-3)
    half = quant_matmul(jnp.asarray(x, jnp.bfloat16), weight, out_dtype=jnp.float32)
    assert half.dtype == jnp.float32 and quant_matmul(jnp.asarray(x, jnp.float16), weight).dtype == jnp.float16
    scale = np.abs(values).max() * np.sqrt(300)
    np.testing.assert_allclose(half, x[..., permutation] @ values.T, atol=0.02 * scale)


def test_the_product_is_that_of_the_unpermuted_matrix():
    """GPTQ's desc_act: columns sorted by group, and what the checkpoint means by them."""
    rng = np.random.default_rng(0)
    group_of_column = rng.permutation(np.repeat(np.arange(3), 64))
    matrix = rng.integers(0, 16, (64, 192)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (64, 3)).astype(np.float32)
    values = (matrix.astype(np.float32) - 8) * scales[:, group_of_column]
    order = np.argsort(group_of_column, kind="stable")
    weight = pack(matrix[:, order], scales, permutation=order, format="int4", group_size=64)
    x = rng.normal(size=(5, 192)).astype(np.float32)
    np.testing.assert_allclose(quant_matmul(x, weight), x @ values.T, rtol=1e-4, atol=1e-3)


def test_blocks_and_single_scales():
    rng = np.random.default_rng(0)
    codes = random_codes(rng, (200, 300), "fp8")
    blocks = rng.uniform(1, 2, (2, 3)).astype(np.float32)
    spread = np.repeat(np.repeat(blocks, 128, 0), 128, 1)[:200, :300]
    weight = pack(codes, blocks, format="fp8", group_size=128)
    np.testing.assert_allclose(dequantize(weight), codes.astype(np.float32) * spread, rtol=1e-6)
    one = pack(codes, np.full((1, 1), 0.5), format="fp8")
    np.testing.assert_array_equal(dequantize(one), codes.astype(np.float32) * 0.5)


@pytest.mark.parametrize(("format", "group_size"), [("fp8", -1), ("fp8", 128), ("int8", -1)])
def test_quantized_activations(format, group_size):
    codes, scales, _, values = canonical(0, 70, 300, format, group_size)
    x = np.random.default_rng(2).normal(size=(4, 300)).astype(np.float32) * np.array([[1], [100], [1e-3], [0]])
    out = quant_matmul(jnp.asarray(x, jnp.float32), pack(codes, scales, format=format, group_size=group_size),
                       activation=format)  # fmt: skip
    expected = x @ values.T
    error = np.abs(np.asarray(out) - expected).max(axis=1)
    allowed = np.abs(x).max(axis=1) * np.sqrt((values**2).sum(axis=1).max()) * {"fp8": 2**-4, "int8": 2**-7}[format]
    assert np.all(error <= allowed)
    assert np.all(error[:3] > 0), "x was not rounded"


def test_int8_activations_are_exact_where_x_is_integer():
    codes, scales, _, values = canonical(0, 70, 128, "int8", -1)
    x = np.random.default_rng(2).integers(-127, 128, (4, 128)).astype(np.float32)
    x[:, 0] = 127
    out = quant_matmul(x, pack(codes, scales, format="int8"), activation="int8")
    np.testing.assert_allclose(out, x @ values.T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("sizes", [(64, 128, 70), (40, 8, 64)], ids=["whole tiles", "within tiles"])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_concatenate(sizes, format):
    parts = [canonical(i, out, 256, format, 64, "integer" if i else None) for i, out in enumerate(sizes)]
    permutation = np.random.default_rng(0).permutation(256)
    weights = [pack(c, s, z, permutation, format=format, group_size=64) for c, s, z, _ in parts]
    joined = concatenate(weights)
    assert joined.shape == (sum(sizes), 256) and isinstance(joined.codes, np.ndarray)
    np.testing.assert_allclose(dequantize(joined), np.concatenate([values for *_, values in parts]), rtol=1e-6)


def test_abstract_is_what_pack_makes():
    for format, group_size, zeros in [
        ("int4", 128, "integer"),
        ("int4", 32, None),
        ("int8", -1, None),
        ("fp8", 256, None),
    ]:
        codes, scales, zero, _ = canonical(0, 100, 300, format, group_size, zeros, np.float16)
        weight = pack(codes, scales, zero, np.arange(300), format=format, group_size=group_size)
        declared = abstract(
            100, 300, format=format, group_size=group_size, zeros=zeros is not None, permutation=True,
            scale_dtype=np.float16,
        )  # fmt: skip
        assert jax.tree.structure(declared) == jax.tree.structure(weight)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), declared) == jax.tree.map(
            lambda a: (a.shape, a.dtype), weight
        )
        assert declared.nbytes == weight.nbytes


def test_bad_input_is_named():
    codes, scales, _, _ = canonical(0, 64, 128, "int4", 32)
    with pytest.raises(ValueError, match="format must be one of int4, int8, fp8, got 'int3'"):
        pack(codes, scales, format="int3")
    with pytest.raises(ValueError, match="group_size must be -1, 16, 32, 64 or a multiple of 128, got 48"):
        pack(codes, scales, format="int4", group_size=48)
    with pytest.raises(ValueError, match=r"codes of int8 must be int8\[out, in\], got uint8\[64, 128\]"):
        pack(codes, scales, format="int8")
    with pytest.raises(ValueError, match=r"scales must be \[out=64, groups=2\] for group_size 64, got shape \[64, 4\]"):
        pack(codes, scales, format="int4", group_size=64)
    with pytest.raises(ValueError, match=r"permutation must be \[in=128\], got shape \[7\]"):
        pack(codes, scales, permutation=np.arange(7), format="int4", group_size=32)
    weight = pack(codes, scales, format="int4", group_size=32)
    with pytest.raises(ValueError, match=r"x must be \[..., in_features=128\], got shape \[3, 64\]"):
        quant_matmul(jnp.zeros((3, 64)), weight)
    with pytest.raises(ValueError, match="activation 'fp8' needs a weight of that format, got 'int4'"):
        quant_matmul(jnp.zeros((3, 128)), weight, activation="fp8")
    grouped = pack(*canonical(0, 64, 128, "int8", 32)[:2], format="int8", group_size=32)
    with pytest.raises(ValueError, match="activation 'int8' needs group_size -1 and no zeros, got group_size 32"):
        quant_matmul(jnp.zeros((3, 128)), grouped, activation="int8")
    with pytest.raises(ValueError, match=r"weights must have the same format, got \['int4', 'int8'\]"):
        concatenate([weight, grouped])
    shuffled = pack(codes, scales, permutation=np.arange(128), format="int4", group_size=32)
    with pytest.raises(ValueError, match="weights must have the same permutation"):
        concatenate([weight, shuffled])
