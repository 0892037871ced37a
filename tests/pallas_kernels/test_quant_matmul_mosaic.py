"""The Hopper kernel of quant_matmul, interpreted against NumPy; on a GPU against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.quant_matmul import abstract, mosaic_gpu, pack, reference
from pallas_kernels.quant_matmul.mosaic_gpu import Config
from pallas_kernels.quant_matmul.specs import SPECS
from tests.pallas_kernels.test_quant_matmul import canonical

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Format, group size, zeros; batch, out, in; (warpgroups, stages, CTAs, tile of the batch); dtype.
CASES = {
    "int4": (("int4", 128, None), (3, 256, 512), (2, 2, 3, 8), "bfloat16"),
    "zeros, small groups": (("int4", 32, "integer"), (9, 128, 256), (2, 2, 3, 16), "float16"),
    "groups of 16": (("int4", 16, None), (1, 128, 128), (2, 2, 1, 8), "bfloat16"),
    "large groups": (("int4", 256, "integer"), (8, 128, 512), (2, 2, 2, 8), "bfloat16"),
    "int4 per channel": (("int4", -1, None), (2, 128, 256), (2, 2, 2, 8), "bfloat16"),
    "tiles of the batch": (("int8", -1, None), (20, 192, 384), (3, 2, 4, 8), "bfloat16"),
    "a block lacks tiles, columns are padded": (("int8", 64, None), (4, 200, 300), (3, 2, 2, 8), "float16"),
    "a block in many parts": (("fp8", -1, None), (1, 128, 768), (2, 2, 6, 8), "bfloat16"),
    "more CTAs than steps": (("fp8", 128, None), (1, 128, 256), (2, 3, 5, 8), "bfloat16"),
}


def multiply(x, weight, out_dtype="float32", activation=None, **kwargs):
    return mosaic_gpu.quant_matmul(x, weight, activation=activation, out_dtype=jnp.dtype(out_dtype), **kwargs)


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted(case):
    (format, group_size, zeros), (batch, out, in_), config, dtype = case
    codes, scales, zero, values = canonical(0, out, in_, format, group_size, zeros)
    permutation = np.random.default_rng(1).permutation(in_)
    weight = pack(codes, scales, zero, permutation, format=format, group_size=group_size)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, in_)), dtype)
    assert mosaic_gpu.supported(x, weight, activation=None, out_dtype=jnp.dtype("float32"), interpret=True) is None
    config = Config(*config)
    y = multiply(x, weight, config=config, interpret=True)
    expected = np.asarray(x, np.float64)[:, permutation] @ values.T
    assert y.shape == (batch, out) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@interpreted
@pytest.mark.parametrize(("format", "group_size"), [("fp8", -1), ("fp8", 128), ("fp8", 32), ("int8", -1)])
def test_quantized_activations_interpreted(format, group_size):
    codes, scales, _, _ = canonical(0, 128, 300, format, group_size)
    weight = pack(codes, scales, format=format, group_size=group_size)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 300)), jnp.bfloat16)
    arguments = {"activation": format, "out_dtype": jnp.dtype(jnp.float32)}
    y = mosaic_gpu.quant_matmul(x, weight, **arguments, config=Config(2, 2, 2, 8), interpret=True)
    expected = reference.quant_matmul(x, weight, **arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@interpreted
@pytest.mark.parametrize("batch", [3, 16])
def test_whole_blocks_are_written_as_they_are(batch):
    codes, scales, _, values = canonical(0, 200, 256, "int8", -1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, 256)), jnp.bfloat16)
    config = Config(2, 2, 2, 8, split=False)
    y = multiply(x, pack(codes, scales, format="int8"), "bfloat16", config=config, interpret=True)
    expected = np.asarray(x, np.float64) @ values.T
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5 * np.abs(expected).max())


def test_a_large_batch_goes_to_xla():
    codes, scales, _, values = canonical(0, 128, 128, "int4", 128)
    x = jnp.ones((2, 5, 128), jnp.bfloat16)
    y = multiply(x, pack(codes, scales, format="int4", group_size=128), config=Config(2, 2, 1, 8, max_batch=9))
    np.testing.assert_allclose(y, np.broadcast_to(values.sum(axis=1), (2, 5, 128)), rtol=0.02, atol=1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_default_config_fits(spec):
    weight = abstract(
        spec.out_features, spec.in_features, format=spec.format, group_size=spec.group_size, zeros=spec.zeros
    )
    if spec.batch <= 256:
        config = mosaic_gpu.default_config(weight, spec.batch)
        assert mosaic_gpu.fits(weight, config)
        used = config.stages * mosaic_gpu._stage_bytes(weight, config) + mosaic_gpu._shared_bytes(config)
        assert used <= mosaic.SHARED_MEMORY


@interpreted
def test_the_reason_why_not():
    codes, scales, zeros, _ = canonical(0, 64, 128, "int4", 128, "float")
    weight = pack(codes, scales, format="int4", group_size=128)
    x = jnp.zeros((1, 128), jnp.bfloat16)

    def reason(x=x, weight=weight, activation=None, out_dtype=jnp.bfloat16):
        return mosaic_gpu.supported(x, weight, activation=activation, out_dtype=jnp.dtype(out_dtype), interpret=True)

    assert reason() is None
    assert "x float32, one of bfloat16 and float16" in reason(x=x.astype(jnp.float32))
    assert "out_dtype int8, one of" in reason(out_dtype=jnp.int8)
    float_zeros = pack(codes, scales, zeros, format="int4", group_size=128)
    assert "int4 with zeros float32, only int4 with integers" in reason(weight=float_zeros)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.batch <= 256], ids=lambda spec: spec.name)
def test_spec_on_the_gpu(spec):
    rng = np.random.default_rng(0)
    out = min(spec.out_features, 1024)
    codes, scales, zeros, _ = canonical(
        0, out, spec.in_features, spec.format, spec.group_size, "integer" if spec.zeros else None, np.float16
    )
    weight = jax.device_put(pack(codes, scales, zeros, format=spec.format, group_size=spec.group_size))
    for dtype in ("bfloat16", "float16"):
        x = jnp.asarray(rng.normal(size=(spec.batch, spec.in_features)), dtype)
        product = functools.partial(multiply, weight=weight, activation=spec.activation)
        y = np.asarray(product(x))
        expected = np.asarray(
            reference.quant_matmul(
                x.astype(jnp.float32), weight, activation=spec.activation, out_dtype=jnp.dtype(jnp.float32)
            )
        )
        np.testing.assert_allclose(y, expected, atol=1e-3 * expected.std(), rtol=1e-3)
        # A row's product does not depend on what else is in the batch.
        others = jnp.where((jnp.arange(spec.batch) % 2 == 0)[:, None], x, jnp.nan)
        np.testing.assert_array_equal(np.asarray(product(others))[::2], y[::2])


@pytest.mark.gpu
@pytest.mark.parametrize("warpgroups", [2, 3, 4])
def test_every_configuration_gives_the_same(warpgroups):
    codes, scales, zeros, values = canonical(0, 640, 1024, "int4", 64, "integer")
    weight = jax.device_put(pack(codes, scales, zeros, format="int4", group_size=64))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1024)), jnp.bfloat16)
    config = mosaic_gpu.default_config(weight, 5)
    config = dataclasses.replace(config, warpgroups=warpgroups, num_ctas=7)
    config = mosaic_gpu.with_stages(weight, config)
    expected = np.asarray(x, np.float64) @ values.T
    np.testing.assert_allclose(multiply(x, weight, config=config), expected, atol=1e-3 * expected.std(), rtol=1e-3)
