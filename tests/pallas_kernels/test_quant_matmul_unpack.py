"""What a GPU computes from the constants of unpack's instructions; the rest of it is test_quant_matmul_mosaic's."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import unpack


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("middle", [8, 0])
def test_a_nibble_is_the_bits_of_a_denormal_number(dtype, middle):
    ptx = unpack._nibbles(jnp.dtype(dtype).name, centered=middle == 8)
    constants = {
        name: np.uint16(int(bits, 16)).view(dtype).astype(np.float64)
        for name, bits in re.findall(r"mov\.b32 (\w+), 0x[0-9a-f]{4}([0-9a-f]{4});", ptx)
    }
    codes = np.arange(16, dtype=np.uint16)
    for factor, bits in (("low", codes), ("high", codes << 4)):
        values = bits.view(dtype).astype(np.float64) * constants[factor] + constants["middle"]
        np.testing.assert_array_equal(values / unpack.unit("int4", interpret=False), codes.astype(np.float64) - middle)
        np.testing.assert_array_equal(values, values.astype(dtype).astype(np.float64))
