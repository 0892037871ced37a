"""What a GPU computes from the constants of unpack's instructions; the rest of it is test_quant_matmul_mosaic's."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import unpack


def constants(ptx, dtype):
    """The 16-bit numbers that registers are set to, by name."""
    found = re.findall(r"mov\.b32 (\w+), 0x[0-9a-f]{4}([0-9a-f]{4});", ptx)
    return {name: np.uint16(int(bits, 16)).view(dtype).astype(np.float64) for name, bits in found}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("middle", [8, 0])
def test_a_nibble_is_the_bits_of_a_denormal_number(dtype, middle):
    factors = constants(unpack._nibbles(jnp.dtype(dtype).name, centered=middle == 8), dtype)
    codes = np.arange(16, dtype=np.uint16)
    for factor, bits in (("low", codes), ("high", codes << 4)):
        values = bits.view(dtype).astype(np.float64) * factors[factor] + factors["middle"]
        wanted = codes.astype(np.float64) - middle
        np.testing.assert_array_equal(values / unpack.unit("int4", dtype, interpret=False), wanted)
        np.testing.assert_array_equal(values, values.astype(dtype).astype(np.float64))


def test_a_byte_is_the_bits_of_a_denormal_number():
    factors = constants(unpack._INT8_BFLOAT16, jnp.bfloat16)
    codes = np.arange(-128, 128)
    bits = (codes.astype(np.int8).view(np.uint8) ^ 0x80).astype(np.uint16)
    values = bits.view(jnp.bfloat16).astype(np.float64) * factors["large"] + factors["middle"]
    np.testing.assert_array_equal(values / unpack.unit("int8", jnp.bfloat16, interpret=False), codes)
    np.testing.assert_array_equal(values, values.astype(jnp.bfloat16).astype(np.float64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_code_is_so_many_of_the_smallest_numbers(dtype):
    smallest = unpack.SMALLEST[jnp.dtype(dtype).name]
    codes = np.arange(16, dtype=np.uint16)
    for factor in (1, 16):
        for sign, bit in ((1, 0), (-1, 0x8000)):
            values = (codes * factor | bit).astype(np.uint16).view(dtype).astype(np.float64)
            np.testing.assert_array_equal(values, sign * factor * smallest * codes)


def test_products_of_codes_and_activations_are_in_reach_of_float32():
    for name, smallest in unpack.SMALLEST.items():
        one = np.float64(smallest) * unpack.ACTIVATION_FACTOR[name]
        assert one * 1e-9 > np.finfo(np.float32).tiny and np.float32(1 / one) < np.inf
