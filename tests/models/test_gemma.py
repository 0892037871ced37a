"""Gemma 2 and 3 against transformers."""

import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from jaxllm.models import build, read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# Published configs, without keys of no effect on inference.
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
GEMMA3_4B = {  # all that the published text_config says
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}
TINY = {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 11,
    "sliding_window": 7,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
# Small caps, so that they show.
TINY_GEMMA2 = GEMMA2_2B | TINY | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
TINY_GEMMA3 = GEMMA3_1B | TINY | {"num_hidden_layers": 3, "sliding_window_pattern": 3}


VARIANTS = {"gemma2": TINY_GEMMA2, "gemma3": TINY_GEMMA3}


@pytest.mark.parametrize("variant", ref.slow_but(("gemma2",), VARIANTS))
def test_alone(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_alone(network, params, reference, ref.prompt(21, 96))


@pytest.mark.parametrize("variant", ref.slow_but(("gemma3",), VARIANTS))
def test_batched(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (12, 19, 11)])


def test_both_ropes_as_both_versions_of_transformers_write_them():
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    ropes["sliding_attention"] = {"rope_type": "default", "rope_theta": 10000.0}
    old = GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = GEMMA3_1B | dict.fromkeys(("rope_scaling", "rope_theta", "rope_local_base_freq")) | {"rope_parameters": ropes}
    assert read_config(old) == read_config(new)
    config = read_config(new)
    assert (config.rope.factor, config.rope.theta, config.local_rope.factor, config.local_rope.theta) == (
        8,
        1e6,
        1,
        1e4,
    )


@pytest.mark.slow
def test_text_part_of_a_multimodal_checkpoint(tmp_path):
    reference = ref.made_by_transformers(tmp_path / "text", TINY_GEMMA3)
    text = load_file(tmp_path / "text" / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in text.items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(8)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(8)
    config = GEMMA3_4B | {"torch_dtype": "float32", "text_config": TINY_GEMMA3}
    folder = ref.write_checkpoint(tmp_path / "both", config, tensors)
    network, params = ref.open_checkpoint(folder)
    ref.check_alone(network, params, reference, ref.prompt(10, 96))


def test_published_configs():
    gemma2, small, large = map(read_config, (GEMMA2_2B, GEMMA3_1B, GEMMA3_4B))
    assert gemma2.windows == (4096, None) * 13 and (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (50, 30)
    assert small.windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert (small.attention_soft_cap, small.logit_soft_cap, small.qk_norm) == (None, None, True)
    assert (large.num_attention_heads, large.num_key_value_heads, large.head_dim, large.vocab_size) == (
        8,
        4,
        256,
        262208,
    )
    assert (large.rope.rope_type, large.local_rope.rope_type, large.dtype) == ("linear", "default", "bfloat16")
    assert large.query_scale == 256**-0.5 and large.tie_word_embeddings and large.max_model_len == 131072


def test_embedding_scale_is_rounded_to_the_dtype():
    from jaxllm.models.gemma import Gemma2ForCausalLM

    config = read_config(GEMMA2_2B | {"hidden_size": 3072})
    scales = [Gemma2ForCausalLM(config, jnp.dtype(name)).embed_scale for name in ("bfloat16", "float32")]
    assert scales[0] == 55.5 and abs(scales[1] - 3072**0.5) < 1e-5
    assert build(config).dtype == jnp.float32


BAD = {
    "bidirectional": (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "text": (GEMMA3_4B | {"text_config": None}, "text_config=None must be an object"),
    "activation": (GEMMA2_2B | {"hidden_activation": "mish"}, "hidden_activation='mish' is not supported"),
    "scalar": (GEMMA2_2B | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    "soft cap": (GEMMA2_2B | {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50' must be a finite number"),
    "pattern": (GEMMA3_1B | {"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be an integer >= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)
