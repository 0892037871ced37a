"""jaxllm inspect and merge-lora; and the engine that quantizes while it loads, or has an adapter."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.inspection import inspect
from jaxllm.models import CheckpointError, build, read_config, save_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
    "initializer_range": 0.1,
}
LINEAR = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 256
OTHER = 2 * 96 * 128 + 3 * 128
ENGINE = dict(
    skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=16, num_gpu_blocks_override=16, max_model_len=64,
    use_tqdm_on_load=False, enforce_eager=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network = build(read_config(CONFIG), "float32")
    save_checkpoint(network, network.init(jax.random.key(0)), folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(0)
    name = "base_model.model.model.layers.0.mlp.down_proj"
    a, b = rng.normal(size=(4, 256)).astype(np.float32), rng.normal(size=(128, 4)).astype(np.float32)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]}')
    return folder


def greedy(folder, **fields):
    llm = LLM(folder, **(ENGINE | fields))
    params = SamplingParams(temperature=0, max_tokens=6)
    return llm.generate([[3, 1, 4, 1, 5]], params, use_tqdm=False)[0].outputs[0].token_ids


def test_counts(folder):
    found = inspect(EngineConfig(model=folder, dtype="bfloat16"))
    assert (found.architecture, found.parameters, found.quantization) == ("LlamaForCausalLM", LINEAR + OTHER, "none")
    assert found.weight_bytes == 2 * (LINEAR + OTHER)
    assert found.kv_bytes_per_token == 2 * 2 * 32 * 2  # k and v, heads, head dim, bytes
    assert found.kv_tokens * found.kv_bytes_per_token <= 512 * 2**20 and found.max_model_len == 512


def test_quantized(folder):
    found = inspect(EngineConfig(model=folder, dtype="bfloat16", quantization="int4"))
    assert found.parameters == LINEAR + OTHER
    assert found.weight_bytes == LINEAR // 2 + LINEAR // 128 * 4 + 2 * OTHER  # codes, scales and zeros, floats
    assert found.quantization == "int4 (int4, groups of 128, zeros; 4 weights)"


def test_command_line(folder, capsys):
    assert main(["inspect", str(folder), "--quantization", "int8", "--max-model-len", "100"]) == 0
    out = capsys.readouterr().out
    for text in ("LlamaForCausalLM", f"{LINEAR + OTHER:,}", "int8, a scale a row", "sequences of 100 tokens", "cpu"):
        assert text in out


def test_no_value_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxllm.models.checkpoint_files._MappedReader.__call__", lambda self: pytest.fail("read"))
    inspect(EngineConfig(model=folder))
    shutil.copytree(folder, tmp_path / "other")
    config = CONFIG | {"intermediate_size": 260}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.weight.*expected shape \[128, 260\], found \[128, 256\]"):
        inspect(EngineConfig(model=tmp_path / "other"))


def test_engine_quantizes_while_loading(folder):
    assert greedy(folder, quantization="int8")[:3] == greedy(folder)[:3]  # later ones may be close calls
    with pytest.raises(ValueError, match="quantization='awq': the checkpoint is not quantized"):
        greedy(folder, quantization="awq")
    with pytest.raises(ValueError, match=r"quantization must be one of int8, fp8, int4.*'int2'"):
        EngineConfig(quantization="int2")


def test_adapter_in_the_engine_is_the_merged_checkpoint(folder, adapter, tmp_path, capsys):
    assert main(["merge-lora", str(folder), str(adapter), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    merged = greedy(tmp_path / "out")
    assert greedy(folder, lora=str(adapter)) == merged != greedy(folder)
    assert main(["merge-lora", str(folder), str(adapter), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_adapter_needs_a_checkpoints_weights(folder, adapter):
    for fields in ({"load_format": "dummy"}, {"params": {}}):
        with pytest.raises(ValueError, match=r"lora=.* needs a checkpoint's weights"):
            LLM(folder, lora=str(adapter), **ENGINE, **fields)
