"""What a decode step of one row does between its products, compiled for an H200 without a GPU: few kernels."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models.layers.norm import normalized
from pallas_kernels.kv_write import kv_write, kv_write_quantized
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin


def num_kernels(function, *args, **options) -> int:
    """All of them XLA's, and none of them a copy."""
    text = compile_for_h200(function, *args, **options).as_text()
    assert "custom-call(" not in text and "while(" not in text and " copy(" not in text
    return text.count(" fusion(")


@needs_cuda_plugin
@pytest.mark.parametrize("size", [896, 4096])
def test_a_norm_is_one_kernel(size):
    row, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, size), (size,)))
    assert num_kernels(lambda x, weight: normalized(x, 1e-5).astype(x.dtype) * weight, row, weight) == 1


@needs_cuda_plugin
def test_a_token_is_written_by_few_kernels():
    def arrays(dtype):
        pages, scales = ((4096, 8, 16, 128), dtype), ((4096, 8, 16), jnp.float32)
        new, slots = ((1, 8, 128), jnp.bfloat16), ((1,), jnp.int32)
        return [
            [jax.ShapeDtypeStruct(*one) for one in many]
            for many in ((pages, pages), (scales, scales), (new, new, slots))
        ]

    pages, _, new = arrays("bfloat16")
    assert num_kernels(kv_write, *pages, *new, donate_argnums=(0, 1)) == 2
    pages, scales, new = arrays("int8")
    # Four arrays: JAX 0.11's XLA has a kernel for each, 0.12's finds the scales by two more.
    assert num_kernels(kv_write_quantized, *pages, *scales, *new, donate_argnums=range(4)) <= 6
