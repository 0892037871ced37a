"""The Hopper kernel of quant_matmul for few rows, interpreted against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.quant_matmul import abstract, few_rows, mosaic_gpu, pack
from pallas_kernels.quant_matmul.few_rows import Config
from pallas_kernels.quant_matmul.specs import SPECS
from tests.pallas_kernels.test_quant_matmul import canonical

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Format, group size, zeros; batch, out, in; (rows, warpgroups, split, CTAs, stages); dtype.
CASES = {
    "int4": (("int4", 128, None), (3, 192, 512), (64, 2, 1, 2, 3), "bfloat16"),
    "zeros, small groups, uneven shares": (("int4", 32, "integer"), (9, 64, 640), (64, 2, 2, 1, 2), "float16"),
    "groups of 16": (("int4", 16, None), (1, 64, 128), (64, 1, 1, 1, 2), "bfloat16"),
    "large groups, sums of three warpgroups": (("int4", 256, "integer"), (16, 128, 512), (64, 3, 1, 1, 2), "bfloat16"),
    "a scale for each row": (("int4", -1, None), (2, 128, 256), (32, 1, 1, 3, 4), "bfloat16"),
    "more stages than tiles": (("int8", -1, None), (8, 64, 384), (64, 1, 3, 1, 5), "bfloat16"),
    "rows and columns are padded": (("int8", 64, None), (4, 200, 300), (64, 3, 1, 3, 2), "float16"),
    "fp8, a fourth of four tiles": (("fp8", 128, None), (1, 128, 1024), (16, 2, 1, 3, 2), "bfloat16"),
    "half of two tiles, zeros, small groups": (("int4", 32, "integer"), (3, 192, 768), (32, 2, 1, 4, 2), "float16"),
}


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted(case):
    (format, group_size, zeros), (batch, out, in_), config, dtype = case
    codes, scales, zero, values = canonical(0, out, in_, format, group_size, zeros)
    weight = pack(codes, scales, zero, format=format, group_size=group_size)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, in_)), dtype)
    config = Config(*config)
    assert few_rows.fits(weight, batch, config)
    y = mosaic_gpu.quant_matmul(
        x, weight, activation=None, out_dtype=jnp.dtype(jnp.float32), config=config, interpret=True
    )
    expected = np.asarray(x, np.float64) @ values.T
    assert y.shape == (batch, out) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [s for s in SPECS if s.batch <= 8 and not s.activation], ids=lambda spec: spec.name)
def test_default_config_takes_every_spec_of_few_rows(spec):
    weight = abstract(
        spec.out_features, spec.in_features, format=spec.format, group_size=spec.group_size, zeros=spec.zeros
    )
    assert few_rows.fits(weight, spec.batch, few_rows.default_config(weight, spec.batch))
    assert few_rows.default_config(weight, 9) is None


def test_what_does_not_fit_is_refused():
    codes, scales, _, _ = canonical(0, 64, 256, "int8", -1)
    weight = pack(codes, scales, format="int8")
    x = jnp.zeros((1, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"warpgroups=4.* does not fit 1 rows and a weight of 2 tiles of columns"):
        few_rows.multiply(x, weight, out_dtype=jnp.dtype(jnp.float32), config=Config(64, 4, 1, 1, 2), interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", ["integer", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [(64, 1, 1, 10, 2), (64, 2, 3, 4, 5), (32, 2, 1, 7, 3), (16, 3, 1, 7, 2)], ids=str)
def test_every_configuration_gives_the_same(config, dtype, zeros):
    codes, scales, zeros, values = canonical(0, 640, 1536 - 64, "int4", 64, zeros)
    weight = jax.device_put(pack(codes, scales, zeros, format="int4", group_size=64))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1536 - 64)), dtype)
    y = mosaic_gpu.quant_matmul(x, weight, activation=None, out_dtype=jnp.dtype(jnp.float32), config=Config(*config))
    expected = np.asarray(x, np.float64) @ values.T
    np.testing.assert_allclose(y, expected, atol=1e-3 * expected.std(), rtol=1e-3)
