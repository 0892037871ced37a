"""A layer's write and attention compiled for an H200, without a GPU: the pages stay where they are."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models import LayerKV, StepBatch
from jaxllm.models.layers.attention import paged_attention
from pallas_kernels import dispatch, mosaic
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin

T, S, N, K, H, PAGES, PAGE_SIZE = 256, 64, 32, 8, 128, 4096, 32


@needs_cuda_plugin
@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_pages_are_written_in_place(kv_dtype, decode_only, monkeypatch):
    """With the Hopper kernels, and no copy of a page's values or scales beside them."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "mosaic_gpu")
    monkeypatch.setattr(mosaic, "unsupported", lambda interpret: None)  # it looks at this machine's device
    tokens = S if decode_only else T

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    flat = dict.fromkeys(("token_ids", "positions", "seq_ids", "slots"), ints(tokens))
    batch = StepBatch(
        **flat, page_table=ints(S, 64), kv_lens=ints(S), query_starts=ints(S + 1), prompt_lens=ints(S),
        num_decodes=ints(), decode_only=decode_only,
    )  # fmt: skip
    pages = jax.ShapeDtypeStruct((PAGES, K, PAGE_SIZE, H), kv_dtype)
    scales = None if kv_dtype == "bfloat16" else jax.ShapeDtypeStruct((PAGES, K, PAGE_SIZE), jnp.float32)
    kv = LayerKV(pages, pages, scales, scales)

    def layer(kv, q, k, v, weight, batch):
        out, kv = paged_attention(q, k, v, kv, batch, scale=H**-0.5)
        return out.reshape(tokens, -1) @ weight, kv

    q, k, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, N, H), (tokens, K, H), (N * H, 8)))
    compiled = compile_for_h200(layer, kv, q, k, k, weight, batch, donate_argnums=0)
    memory, pool = compiled.memory_analysis(), pages.size * pages.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * pool and memory.temp_size_in_bytes < pool / 8
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == (1 if decode_only else 2)
