"""TinyLLM: built in, and as docs/add_a_model.md adds it from outside; both against Qwen2, which it equals."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import read_config, registry  # noqa: E402
from jaxllm.models.tinyllm import TinyllmForCausalLM  # noqa: E402
from tests.models import references as ref  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"
CONFIG = {
    "architectures": ["TinyllmForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "model_type": "tinyllm",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 98,
}


@pytest.fixture
def checkpoint(tmp_path):
    """(reference, folder)"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    keys = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type", "torch_dtype")}
    model = ref.randomize(Qwen2ForCausalLM(Qwen2Config(**keys)))
    folder = ref.write_checkpoint(tmp_path / "tiny-llm-92m", CONFIG, model.state_dict())
    return ref.of_transformers(model), folder


def test_alone(checkpoint):
    reference, folder = checkpoint
    network, params = ref.open_checkpoint(folder)
    assert network.config.attention_bias and not network.config.attention_out_bias
    ref.check_alone(network, params, reference, ref.prompt(21, 98))


def test_the_pages_model_from_outside(checkpoint, monkeypatch, capsys):
    reference, folder = checkpoint
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.chdir(folder.parent)
    model, run = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(model.splitlines()) < 40
    namespace = {"__name__": "my_package.tinyllm"}
    exec(model, namespace)
    assert registry.model_class("TinyllmForCausalLM") is namespace["TinyllmForCausalLM"] is not TinyllmForCausalLM
    exec(run, namespace)
    expected = [ref.reference_greedy(reference, tokens) for tokens in ([5, 1, 7], [2, 8, 6, 4])]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_the_pages_files_exist():
    for name in re.findall(r"`((?:models|tests)/[a-z0-9_/]+\.py)`", PAGE.read_text()):
        assert (PAGE.parents[1] / name).is_file(), name


def test_config():
    assert read_config(CONFIG | {"num_key_value_heads": None}).num_key_value_heads == 4
    with pytest.raises(ValueError, match="intermediate_size=0 must be an integer >= 1"):
        read_config(CONFIG | {"intermediate_size": 0})
