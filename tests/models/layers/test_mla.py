"""Latent attention in a network, with the Hopper kernel of its decode rows interpreted and with the reference."""

import jax
import numpy as np
import pytest

from jaxllm.models import build, read_config
from pallas_kernels import dispatch, mosaic
from tests.models.stepping import Stepper

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


def logits_of(network, params):
    """Of a prompt, of its next token beside another prompt, and of both rows' next tokens."""
    rows = Stepper(network, params, page_size=16)
    tokens = np.random.default_rng(0).integers(0, 96, 70).tolist()
    a = rows.add(tokens)
    logits = [rows.step({a: len(tokens)})]
    rows.append(a, 5)
    b = rows.add(tokens[:15])
    logits.append(rows.step({a: 1, b: 15}))
    for row, token in ((a, 7), (b, 9)):
        rows.append(row, token)
    logits.append(rows.step({a: 1, b: 1}, decode_only=True, pad=1))
    return np.stack([step[row] for step in logits for row in sorted(step)])


@pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")
def test_the_hopper_kernel_in_a_network(monkeypatch):
    network = build(read_config(CONFIG), "bfloat16")
    params = network.init(jax.random.key(0))
    expected = logits_of(network, params)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "interpret")
    monkeypatch.setattr(mosaic, "num_multiprocessors", lambda: 2)  # they run one by one
    jax.clear_caches()
    logits = logits_of(network, params)
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())
    assert not np.array_equal(logits, expected)  # it was another implementation
