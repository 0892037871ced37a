import pytest

from jaxllm.models import ModelConfig

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def test_absent_keys_have_llamas_defaults():
    config = ModelConfig.from_hf(MINIMAL)
    assert (config.num_key_value_heads, config.head_dim, config.hidden_act) == (4, 8, "silu")
    assert (config.rms_norm_eps, config.max_position_embeddings, config.dtype) == (1e-6, 2048, "float32")
    assert (config.rope.rope_type, config.rope.theta, config.rope.rotary_dim) == ("default", 10000.0, 8)
    assert not (config.tie_word_embeddings or config.attention_bias or config.attention_out_bias or config.mlp_bias)


def test_null_is_absent():
    absent = dict.fromkeys(["num_key_value_heads", "head_dim", "rope_scaling", "rope_theta", "torch_dtype"])
    assert ModelConfig.from_hf(MINIMAL | absent) == ModelConfig.from_hf(MINIMAL)


def test_both_versions_keys_mean_the_same():
    version4 = {"rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    version5 = {"dtype": "bfloat16", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    oldest = version4 | {"rope_scaling": {"type": "llama3", **LLAMA3}}
    configs = [ModelConfig.from_hf(MINIMAL | keys) for keys in (version4, version5, oldest)]
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].rope.theta, configs[0].rope.max_positions, configs[0].dtype) == (5e5, 16, "bfloat16")


def test_partial_rotation():
    assert ModelConfig.from_hf(MINIMAL | {"partial_rotary_factor": 0.5}).rope.rotary_dim == 4


def test_config_is_hashable():
    assert hash(ModelConfig.from_hf(MINIMAL)) == hash(ModelConfig.from_hf(dict(MINIMAL)))


BAD = {
    "missing": ({"hidden_size": None}, ["hidden_size is missing"]),
    "no architecture": ({"architectures": []}, ["architectures=[]", "LlamaForCausalLM"]),
    "zero": ({"num_hidden_layers": 0}, ["num_hidden_layers=0", ">= 1"]),
    "text": ({"vocab_size": "64"}, ["vocab_size='64'", "integer"]),
    "bool for a number": ({"vocab_size": True}, ["vocab_size=True", "integer"]),
    "nan": ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "finite"]),
    "number for a bool": ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "true or false"]),
    "heads": ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "divide", "num_attention_heads=4"]),
    "head_dim": ({"hidden_size": 30}, ["hidden_size=30", "num_attention_heads=4", "head_dim"]),
    "odd head_dim": ({"head_dim": 7}, ["head_dim=7", "even"]),
    "hidden_act": ({"hidden_act": "mish"}, ["hidden_act='mish'", "silu", "gelu"]),
    "dtype": ({"torch_dtype": "int8"}, ["torch_dtype='int8'", "bfloat16"]),
    "rope not a dict": ({"rope_scaling": 2.0}, ["rope_scaling=2.0", "rope_type"]),
    "rope type": ({"rope_scaling": {"type": "mrope"}}, ["rope_scaling.rope_type='mrope'", "llama3", "yarn"]),
    "rope key": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}},
        ["rope_parameters.mrope_section=[1]", "factor"],
    ),
    "rope key missing": ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor is missing", "'linear'"]),
    "rope factor": ({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, ["rope_scaling.factor=0.5", ">= 1.0"]),
    "rope by layer type": ({"rope_parameters": {"sliding_attention": {}}}, ["rope_parameters.sliding_attention"]),
    "llama3 order": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        ["low_freq_factor=4.0", "high_freq_factor=4.0"],
    ),
    "partial rotation": (
        {"partial_rotary_factor": 1.5},
        ["partial_rotary_factor=1.5", "from 2 to head_dim"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_keys_are_errors_that_say_what_is_allowed(case):
    changes, words = BAD[case]
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(MINIMAL | changes)
    for word in words:
        assert word in str(error.value)
