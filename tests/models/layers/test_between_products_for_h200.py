"""What a step does between its products, compiled for an H200 without a GPU: few kernels, and no copies."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models.interface import StepBatch
from jaxllm.models.layers.attention import by_phase
from jaxllm.models.layers.norm import normalized
from jaxllm.models.layers.rope import rotate
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


@needs_cuda_plugin
def test_a_rotation_is_one_pass():
    """The table of both signs is made once for all layers. Halves put together would be two passes."""
    q, table = jax.ShapeDtypeStruct((8192, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    text = compile_for_h200(rotate, q, table, table).as_text()
    assert text.count(" fusion(") == 2 and not re.search(r"= bf16\[8192,32\S* concatenate\(", text)


@needs_cuda_plugin
def test_decode_rows_join_the_others_in_place():
    rows, tokens = 256, 8192
    q, ints = jax.ShapeDtypeStruct((tokens, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def attend(q, kv_lens, query_starts, num_decodes):
        batch = StepBatch(
            **dict.fromkeys(("token_ids", "positions", "seq_ids", "slots", "page_table", "prompt_lens"), kv_lens),
            kv_lens=kv_lens, query_starts=query_starts, num_decodes=num_decodes, decode_only=False,
        )  # fmt: skip
        return by_phase(
            q, batch,
            decode=lambda q, table, lens: q * lens[:, None, None].astype(q.dtype),
            prefill=lambda q, table, lens, starts: jax.lax.optimization_barrier(jnp.flip(q, 0)),
        )  # fmt: skip

    starts, scalar = jax.ShapeDtypeStruct((rows + 1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = compile_for_h200(attend, q, ints, starts, scalar)
    assert compiled.memory_analysis().temp_size_in_bytes < q.size * 2 / 8
    # One that reads what it writes over, as choosing between both does, is a pass over all tokens.
    assert "dynamic-update-slice(" not in compiled.as_text()
