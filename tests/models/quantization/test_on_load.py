"""Quantization while loading: how far values move, and that the network computes with exactly those."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.models import build, load_params, read_config, registry, save_checkpoint
from jaxllm.models.lora import Adapter
from jaxllm.models.quantization import choose
from jaxllm.models.quantization.scheme import dequantize
from tests.models.quantization.test_checkpoints import CONFIG, MOE, assert_same


def rounded(weight, method):
    scheme = choose(None, method).scheme("any")
    return scheme.canonical({"weight": weight}), scheme.layout


def test_int8_rounds_to_half_a_step_of_each_row():
    weight = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    given, layout = rounded(weight, "int8")
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(dequantize(given, layout) - weight) <= step * 0.501)


def test_fp8_keeps_three_bits_and_each_rows_largest():
    weight = np.random.default_rng(0).normal(size=(5, 300)).astype(ml_dtypes.bfloat16)
    given, layout = rounded(weight, "fp8")
    values, exact = dequantize(given, layout), weight.astype(np.float32)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    assert np.all(np.abs(values - exact) <= np.maximum(np.abs(exact) / 16, largest / 448 / 512 / 2) * 1.01)
    np.testing.assert_allclose(np.abs(values).max(axis=1, keepdims=True), largest, rtol=1e-6)


@pytest.mark.parametrize("columns", [256, 200])  # 200: the last group is short
def test_int4_rounds_to_a_step_of_each_group(columns):
    weight = np.random.default_rng(0).normal(1.0, 1.0, size=(5, columns)).astype(np.float32)
    given, layout = rounded(weight, "int4")
    assert given.codes.max() == 15 and given.codes.min() == 0 and given.scales.shape == (5, 2)
    steps = np.repeat(given.scales.astype(np.float32), 128, axis=1)[:, :columns]
    assert np.all(np.abs(dequantize(given, layout) - weight) <= steps * 1.01)


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_rows_of_zeros_stay_zeros(method):
    given, layout = rounded(np.zeros((3, 128), np.float32), method)
    assert np.all(dequantize(given, layout) == 0)


def folder_of(tmp_path, **config):
    network = build(read_config(CONFIG | {"initializer_range": 0.1} | config))
    save_checkpoint(network, network.init(jax.random.key(0)), tmp_path)
    return network, tmp_path


@pytest.mark.parametrize(("method", "config"), [("int8", {}), ("fp8", {}), ("int4", {}), ("int4", MOE)])
def test_network_computes_with_the_rounded_values(method, config, tmp_path):
    floats, folder = folder_of(tmp_path, **config)
    network = build(registry.quantized(floats.config, method))
    params = load_params(network, folder, progress=False)
    assert params["lm_head"]["weight"].dtype == np.float32  # the output head stays as it is
    values = load_file(folder / "model.safetensors")
    for name, value in values.items():
        if ".layers." in name and value.ndim == 2 and not name.endswith("gate.weight"):  # routers' stay
            given, layout = rounded(value, method)
            values[name] = dequantize(given, layout)
    (folder / "rounded").mkdir()
    save_file(values, folder / "rounded" / "model.safetensors")
    assert_same((network, params), (floats, load_params(floats, folder / "rounded", progress=False)))


def test_adapter_is_merged_before_rounding(tmp_path):
    floats, folder = folder_of(tmp_path)
    rng, name = np.random.default_rng(0), "model.layers.0.mlp.down_proj"
    a, b = rng.normal(size=(2, 256)).astype(np.float32), rng.normal(size=(128, 2)).astype(np.float32)
    (folder / "adapter").mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    network = build(registry.quantized(floats.config, "int8"))
    params = load_params(network, folder, adapter=Adapter(folder / "adapter"), progress=False)
    given, _ = rounded(load_file(folder / "model.safetensors")[f"{name}.weight"] + b @ a, "int8")
    scales = np.asarray(params["layers"]["0"]["mlp"]["down"]["weight"]["scales"])  # [tiles of 64 rows, 1, 64]
    np.testing.assert_allclose(scales.reshape(-1), given.scales[:, 0], rtol=1e-6)
