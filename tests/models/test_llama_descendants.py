"""Checkpoints that are Llama and name it: Llama 2, Vicuna, Chinese-Alpaca-2, Yi. What differs is data."""

import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import build, read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# The published configs, without keys of no effect on inference.
LLAMA2_13B_CHAT = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
SIZE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
VICUNA_7B_V15 = LLAMA2_13B_CHAT | SIZE_7B
VICUNA_7B_V15_16K = VICUNA_7B_V15 | {"rope_scaling": {"factor": 4.0, "type": "linear"}}
VICUNA_7B_V13 = VICUNA_7B_V15 | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-06}
for _key in ("num_key_value_heads", "pretraining_tp", "rope_scaling"):  # of before Llama 2
    del VICUNA_7B_V13[_key]
CHINESE_ALPACA_2_7B = VICUNA_7B_V15 | {"vocab_size": 55296}
YI_6B_CHAT = LLAMA2_13B_CHAT | SIZE_7B | {
    "attention_bias": False,
    "num_key_value_heads": 4,
    "rope_theta": 5000000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 64000,
}  # fmt: skip
PUBLISHED = {
    "llama-2-13b-chat": LLAMA2_13B_CHAT,
    "vicuna-7b-v1.3": VICUNA_7B_V13,
    "vicuna-7b-v1.5": VICUNA_7B_V15,
    "vicuna-7b-v1.5-16k": VICUNA_7B_V15_16K,
    "chinese-alpaca-2-7b": CHINESE_ALPACA_2_7B,
    "yi-6b-chat": YI_6B_CHAT,
}
EXPECTED = {  # heads, KV heads, longest sequence, rope theta, vocabulary, eps, parameters
    "llama-2-13b-chat": (40, 40, 4096, 1e4, 32000, 1e-5, 13_015_864_320),
    "vicuna-7b-v1.3": (32, 32, 2048, 1e4, 32000, 1e-6, 6_738_415_616),
    "vicuna-7b-v1.5": (32, 32, 4096, 1e4, 32000, 1e-5, 6_738_415_616),
    "vicuna-7b-v1.5-16k": (32, 32, 16384, 1e4, 32000, 1e-5, 6_738_415_616),
    "chinese-alpaca-2-7b": (32, 32, 4096, 1e4, 55296, 1e-5, 6_929_256_448),
    "yi-6b-chat": (32, 4, 4096, 5e6, 64000, 1e-5, 6_061_035_520),
}
# Keys that follow the size of a tiny model, to be put over each published config.
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "torch_dtype": "float32"}
LOADED = {
    "vicuna-7b-v1.3": TINY | {"num_attention_heads": 4, "vocab_size": 96},
    "vicuna-7b-v1.5-16k": TINY | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96},
    "chinese-alpaca-2-7b": TINY | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 103},
    "yi-6b-chat": TINY | {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 96},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    config = read_config(PUBLISHED[name])
    found = (config.num_attention_heads, config.num_key_value_heads, config.max_model_len, config.rope.theta)
    found += (config.vocab_size, config.rms_norm_eps)
    assert (*found, sum(spec.abstract.size for spec in build(config).specs.values())) == EXPECTED[name]


@pytest.mark.parametrize("name", LOADED)
def test_loaded_with_the_buffers_of_old_checkpoints(name, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = PUBLISHED[name] | LOADED[name]
    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    model = ref.randomize(LlamaForCausalLM(LlamaConfig(**keys)))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    folder = ref.write_checkpoint(tmp_path, config, model.state_dict() | buffers, file_format="bin", shards=2)
    network, params = ref.open_checkpoint(folder)
    ref.check_alone(network, params, ref.of_transformers(model), ref.prompt(21, config["vocab_size"]))
