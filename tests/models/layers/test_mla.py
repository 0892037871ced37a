"""Latent attention in a network whose decode rows have the Hopper kernel."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import LayerKV, StepBatch, build, read_config
from pallas_kernels import dispatch, mosaic
from tests.models.stepping import Stepper
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# One layer of DeepSeek-V2-Lite, narrow, with latents that the kernel takes.
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.3,
    "intermediate_size": 40,
    "kv_lora_rank": 128,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 12,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 16,
    "vocab_size": 96,
}


@interpreted
def test_the_hopper_kernel_in_a_network(monkeypatch):
    network = build(read_config(CONFIG), "bfloat16")
    rows = Stepper(network, network.init(jax.random.key(0)), page_size=16)
    tokens = np.random.default_rng(0).integers(0, 96, 70).tolist()
    a, b = rows.add(tokens), rows.add(tokens[:15])
    rows.step({a: 70, b: 15})

    def next_logits():
        again = copy.deepcopy(rows)
        for row, token in ((a, 7), (b, 9)):
            again.append(row, token)
        again._run = jax.jit(again._forward)
        logits = again.step({a: 1, b: 1}, decode_only=True, pad=1)
        return np.stack([logits[a], logits[b]])

    expected = next_logits()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "interpret")
    monkeypatch.setattr(mosaic, "num_multiprocessors", lambda: 2)  # they run one by one
    logits = next_logits()
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())
    assert not np.array_equal(logits, expected)  # it was another implementation


@needs_cuda_plugin
def test_pages_are_written_in_place(monkeypatch):
    """With the Hopper kernel, and no copy of the pages beside them."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "mosaic_gpu")
    monkeypatch.setattr(mosaic, "unsupported", lambda interpret: None)  # it looks at this machine's device
    network = build(read_config(CONFIG | {"kv_lora_rank": 512, "num_attention_heads": 16}), "bfloat16")

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    flat = dict.fromkeys(("token_ids", "positions", "seq_ids", "slots", "kv_lens", "prompt_lens"), ints(64))
    batch = StepBatch(
        **flat, page_table=ints(64, 64), query_starts=ints(65), num_decodes=ints(), decode_only=True
    )  # fmt: skip
    [(shape, _)] = network.kv_shapes(2**16, 16)
    pages = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params, kv = network.abstract_params, (LayerKV(pages, None),)
    compiled = compile_for_h200(network.forward, params, kv, batch, donate_argnums=1)
    memory, pool = compiled.memory_analysis(), pages.size * 2
    assert memory.alias_size_in_bytes >= pool and memory.temp_size_in_bytes < pool / 8
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2
