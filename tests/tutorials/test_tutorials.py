"""The tutorials' offline scripts, as published but for the package's name, with tiny checkpoints at their paths."""

import json
import runpy
from pathlib import Path

import jax
import pytest

from jaxllm.models import build, read_config
from jaxllm.models.weights import save_checkpoint
from jaxllm.runner.model_runner import ModelRunner
from jaxllm.tokenizer_formats.tiktoken_file import GLM4_WORDS, QWEN_WORDS
from tests.tokenizer_folders import byte_level_bpe, tiktoken_ranks, write_ranks

HERE = Path(__file__).parent

TINY = dict(
    num_hidden_layers=1,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    vocab_size=420,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    torch_dtype="float32",
)
GLM4 = dict(
    architectures=["ChatGLMModel"],
    model_type="chatglm",
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    kv_channels=8,
    multi_query_attention=True,
    multi_query_group_num=2,
    padded_vocab_size=151552,  # as published: the script names ids of its special tokens
    seq_length=2048,
    rmsnorm=True,
    apply_residual_connection_post_layernorm=False,
    post_layer_norm=True,
    add_bias_linear=False,
    add_qkv_bias=True,
    layernorm_epsilon=1e-5,
    original_rope=True,
    rope_ratio=1,
    torch_dtype="float32",
)
QWEN = dict(
    architectures=["QWenLMHeadModel"],
    model_type="qwen",
    kv_channels=8,
    seq_length=256,
    layer_norm_epsilon=1e-6,
    no_bias=True,
    rotary_emb_base=10000,
    use_dynamic_ntk=True,
    use_logn_attn=True,
)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def write_model(folder: Path, config: dict) -> Path:
    """A checkpoint of random weights under the names of its architecture."""
    network = build(read_config(config), "float32")
    save_checkpoint(network, network.init(jax.random.key(0)), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_json_tokenizer(folder: Path, **settings) -> None:
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiktoken(folder: Path, file: str, words: str, tokenizer_class: str) -> None:
    write_ranks(folder / file, tiktoken_ranks(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # As with enforce_eager, only the shapes that are met are compiled: all of them take a minute on a CPU.
    monkeypatch.setattr(ModelRunner, "_warm_up", lambda runner: None)
    return tmp_path


def lines_of(script: str, capsys) -> list[str]:
    """What a script prints."""
    runpy.run_path(str(HERE / script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_glm4(here, capsys):
    folder = write_model(here / "path/to/glm-4-9b-chat", GLM4)
    write_tiktoken(folder, "tokenizer.model", GLM4_WORDS, "ChatGLM4Tokenizer")
    (line,) = lines_of("glm4.py", capsys)
    assert line.startswith("Prompt: '给我讲个故事', Generated text: ")


def test_llama2(here, capsys):
    write_json_tokenizer(
        write_model(here / "path/to/Llama-2-13b-chat-hf", {"architectures": ["LlamaForCausalLM"], **TINY})
    )
    lines = lines_of("llama2.py", capsys)
    assert len(lines) == 4 and lines[2].startswith("Prompt: 'The capital of France is', Generated text: ")


OTHERS = {
    "opt-125m": dict(
        architectures=["OPTForCausalLM"],
        model_type="opt",
        ffn_dim=16,
        word_embed_proj_dim=16,
        do_layer_norm_before=True,
        activation_function="relu",
    ),
    "Baichuan2-13B-Chat": dict(
        architectures=["BaichuanForCausalLM"], model_type="baichuan", hidden_act="silu", rms_norm_eps=1e-6
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_models_of_the_second_tutorial(here, capsys, name):
    """Its script, with their names where it says Llama's."""
    write_json_tokenizer(write_model(here / "path/to" / name, {**TINY, **OTHERS[name]}))
    (here / "script.py").write_text((HERE / "llama2.py").read_text().replace("Llama-2-13b-chat-hf", name))
    lines = lines_of(str(here / "script.py"), capsys)
    assert len(lines) == 4 and lines[0].startswith("Prompt: 'Hello, my name is', Generated text: ")


def test_tinyllm(here, capsys):
    config = {"architectures": ["TinyllmForCausalLM"], **TINY, "max_position_embeddings": 1024}
    write_json_tokenizer(write_model(here / "path/to/tiny_llm_sft_92m", config), chat_template=TEMPLATE)
    (line,) = lines_of("tinyllm.py", capsys)
    assert line.startswith("Prompt: '<|system|>你是由wdndev开发的个人助手。<|user|>你好<|assistant|>', Generated")


def test_streaming(here, capsys):
    folder = write_model(here / "path/to/qwen-7b-chat", {**TINY, **QWEN, "intermediate_size": 32, "vocab_size": 1024})
    write_tiktoken(folder, "qwen.tiktoken", QWEN_WORDS, "QWenTokenizer")
    lines = lines_of("streaming.py", capsys)
    names = [line.split(":")[0] for line in lines]
    assert set(names) == {"0", "1", "2"} and all(names.count(name) > 1 for name in "012")
    assert names != sorted(names)  # they took turns
