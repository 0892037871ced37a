"""Every family in half precision, by shapes alone: hidden states stay in the network's dtype, logits are float32."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("torch")  # the configs are in files that need it

from jaxllm.models import LayerKV, StepBatch, build, read_config
from tests.models import test_deepseek, test_gemma, test_llama_variants, test_mixtral, test_phi3

CONFIGS = {
    **test_deepseek.VARIANTS,
    **test_llama_variants.VARIANTS,
    **test_mixtral.VARIANTS,
    "gemma2": test_gemma.TINY_GEMMA2,
    "gemma3": test_gemma.TINY_GEMMA3,
    "phi3": test_phi3.TINY_128K,
}


def abstract_batch(num_tokens, num_rows, decode_only):
    def i32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    of_tokens = (i32(num_tokens),) * 4
    return StepBatch(
        *of_tokens, i32(num_rows, 4), i32(num_rows), i32(num_rows + 1), i32(num_rows), i32(), decode_only=decode_only
    )


@pytest.mark.parametrize("decode_only", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_dtypes(name, decode_only):
    network = build(read_config(CONFIGS[name]), "bfloat16")
    kv = tuple(
        LayerKV(*(shape and jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
        for shapes in network.kv_shapes(8, 4)
    )
    batch = abstract_batch(5, 5, decode_only)
    hidden, new_kv = jax.eval_shape(network.forward, network.abstract_params, kv, batch)
    assert (hidden.shape, hidden.dtype) == ((5, 32), jnp.bfloat16)
    assert new_kv == kv
    logits = jax.eval_shape(network.logits, network.abstract_params, hidden)
    assert (logits.shape, logits.dtype) == ((5, 96), jnp.float32)
