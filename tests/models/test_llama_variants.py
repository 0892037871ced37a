"""What is Llama with other data: Mistral, Qwen2 and Qwen3."""

import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# Published configs, without keys of no effect on inference.
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
MISTRAL_NEMO = MISTRAL_7B_V03 | {
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 1024000,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 96,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}}
SLIDING_QWEN2 = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
VARIANTS = {
    "mistral-v0.1": MISTRAL_7B_V01 | TINY | {"sliding_window": 7},
    "mistral-nemo": MISTRAL_NEMO | TINY | {"head_dim": 16},
    "qwen2.5": QWEN25_7B | TINY,
    "qwen2.5-tied-yarn": QWEN25_7B | TINY | YARN | {"tie_word_embeddings": True},
    "qwen2-sliding": QWEN25_7B | TINY | SLIDING_QWEN2,
    "qwen2-layer-types": QWEN25_7B | TINY | SLIDING_QWEN2 | {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": QWEN3_8B | TINY | {"head_dim": 16},
}


@pytest.mark.parametrize("variant", ref.slow_but(("qwen2.5-tied-yarn", "qwen3"), VARIANTS))
def test_alone(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_alone(network, params, reference, ref.prompt(21, 96))  # longer than every window


@pytest.mark.parametrize("variant", ref.slow_but(("mistral-v0.1",), VARIANTS))
def test_batched(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (12, 19, 11)])


@pytest.mark.slow
def test_engine_with_a_window(tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS["mistral-v0.1"])
    ref.check_engine(tmp_path, reference, [ref.prompt(length, 96) for length in (20, 5, 33)])


def test_published_configs():
    first, third, nemo, qwen2, qwen3 = map(
        read_config, (MISTRAL_7B_V01, MISTRAL_7B_V03, MISTRAL_NEMO, QWEN25_7B, QWEN3_8B)
    )
    assert set(first.windows) == {4096} and set(third.windows) == {None}
    assert (nemo.head_dim, nemo.attention_bias) == (128, False)
    assert (qwen2.attention_bias, qwen2.attention_out_bias, set(qwen2.windows)) == (True, False, {None})
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias, set(qwen3.windows)) == (True, 128, False, {None})


def test_absent_keys_mean_what_transformers_takes_them_for():
    without = {key: value for key, value in MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert set(read_config(without).windows) == {4096}
    sliding = read_config(QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 5})
    assert sliding.windows == (None,) * 20 + (5,) * 8


BAD = {
    "window": (MISTRAL_7B_V01 | {"sliding_window": 0}, "sliding_window=0 must be an integer >= 1"),
    "window layers": (QWEN25_7B | {"max_window_layers": -1}, "max_window_layers=-1 must be an integer >= 0"),
    "layer types": (QWEN25_7B | {"layer_types": ["full_attention"]}, "for each of num_hidden_layers=28"),
    "layer type": (QWEN3_8B | {"layer_types": ["linear_attention"] * 36}, "full_attention, sliding_attention"),
    "no window": (QWEN3_8B | {"layer_types": ["sliding_attention"] * 36}, "sliding_window must be an integer"),
    "rope type": (QWEN3_8B | {"rope_scaling": {"rope_type": "mrope"}}, "rope_type='mrope' is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)
