"""Loading, without PyTorch: `save_checkpoint` writes checkpoints, which are then spoiled."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.models import CheckpointError, ModelConfig, build, check_params, load_params, save_checkpoint
from jaxllm.models.weights import checkpoint_slots
from tests.models.test_config import MINIMAL


def network(dtype="float32", **changes):
    return build(ModelConfig.from_hf(MINIMAL | {"num_key_value_heads": 2} | changes), dtype)


@pytest.fixture
def saved(tmp_path):
    """(network, its parameters, the folder they were saved to)."""
    net = network(attention_bias=True)
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * np.arange(leaf.size).reshape(leaf.shape), net.init(jax.random.key(0))
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    save_checkpoint(net, params, tmp_path)
    return net, params, tmp_path


def rewrite(folder, change):
    """Apply `change` to the dict of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder, count):
    """Split the one file into `count`, so that parts of merged weights are apart; returns the names of the files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file(dict(list(tensors.items())[i::count]), folder / file)
    weight_map = {name: files[i % count] for i, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def load(net, folder):
    return load_params(net, folder, progress=False)


def message(net, folder):
    with pytest.raises(CheckpointError) as error:
        load(net, folder)
    return str(error.value)


def assert_equal(given, expected):
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_saved_file_has_hugging_faces_names_and_parts(saved):
    _, params, folder = saved
    tensors = load_file(folder / "model.safetensors")
    qkv = params["layers"]["1"]["attention"]["qkv"]["weight"]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], qkv[:32])
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], qkv[32:48])
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.v_proj.weight"], qkv[48:])
    gate_up = params["layers"]["0"]["mlp"]["gate_up"]["weight"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], gate_up[48:])
    assert {"lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.bias"} <= set(tensors)


def test_one_file(saved):
    net, params, folder = saved
    assert_equal(load(net, folder), params)


@pytest.mark.parametrize("count", [2, 5])
def test_shards_with_parts_of_merged_weights_apart(saved, count):
    net, params, folder = saved
    shard(folder, count)
    assert_equal(load(net, folder), params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_every_dtype_is_cast_to_the_networks(saved, stored, wanted):
    _, params, folder = saved

    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.dtype(stored))

    rewrite(folder, cast)
    loaded = load(network(wanted, attention_bias=True), folder)
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}


def test_tied_head_may_be_in_the_file_or_not(tmp_path):
    tied = network(tie_word_embeddings=True)
    params = tied.init(jax.random.key(0))
    assert "lm_head" not in params
    save_checkpoint(tied, params, tmp_path)
    assert_equal(load(tied, tmp_path), params)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_equal(load(tied, tmp_path), params)


def test_a_head_that_is_not_the_embedding_is_no_tied_one(tmp_path):
    """transformers does not tie such a head, whatever the config says."""
    untied = network(tie_word_embeddings=False)
    params = untied.init(jax.random.key(0))
    save_checkpoint(untied, params, tmp_path)
    assert "lm_head.weight is not model.embed_tokens.weight" in message(network(tie_word_embeddings=True), tmp_path)
    assert_equal(load(untied, tmp_path), params)


def test_a_decoder_saved_by_itself_lacks_the_first_word_of_its_names(tmp_path):
    tied = network(tie_word_embeddings=True)
    params = tied.init(jax.random.key(0))
    save_checkpoint(tied, params, tmp_path)

    def shorten(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, shorten)
    assert_equal(load(tied, tmp_path), params)


def test_old_checkpoints_rotary_frequencies_are_ignored(saved):
    net, params, folder = saved
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    assert_equal(load(net, folder), params)


def test_all_problems_are_in_one_error_with_file_and_shapes(saved):
    net, _, folder = saved

    def spoil(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((47, 32), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)

    rewrite(folder, spoil)
    text = message(net, folder)
    for line in (
        "LlamaForCausalLM, 4 problem(s)",
        "missing: model.layers.0.self_attn.k_proj.weight, expected shape [16, 32], is in none of model.safetensors",
        "missing: model.norm.weight, expected shape [32]",
        "model.layers.1.mlp.up_proj.weight in model.safetensors: expected shape [48, 32], found [47, 32]",
        "unused: model.layers.2.mlp.up_proj.weight in model.safetensors, shape [48, 32]",
    ):
        assert line in text


def test_codes_are_not_taken_for_floats(saved):
    net, _, folder = saved
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int8)}))
    assert "model.norm.weight in model.safetensors: expected one of float32, bfloat16" in message(net, folder)


def test_same_tensor_in_two_shards(saved):
    net, _, folder = saved
    first, second = shard(folder, 2)
    tensors = load_file(folder / first)
    name, twice = next(iter(load_file(folder / second).items()))
    save_file(tensors | {name: twice}, folder / first)
    assert f"{name} is in both" in message(net, folder)


def test_missing_shards_are_all_named(saved):
    net, _, folder = saved
    files = shard(folder, 4)
    for file in files[1:3]:
        (folder / file).unlink()
    text = message(net, folder)
    assert "lacks 2 of the 4 files" in text and files[1] in text and files[2] in text and files[0] not in text


@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_truncated_file_is_named_with_the_remedy(saved, kept):
    net, _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    text = message(net, folder)
    assert str(file) in text and "truncated or corrupt" in text and "download or save it again" in text


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").touch()
    text = message(network(), tmp_path)
    assert "no weights" in text and "pytorch_model.bin.index.json" in text and "it holds config.json" in text
    assert "not a folder" in message(network(), tmp_path / "absent")


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": ["b"]}}'])
def test_damaged_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "is not an index of shards" in message(network(), tmp_path)


def test_index_cannot_point_outside_of_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    assert "outside of its folder" in message(network(), tmp_path)


def test_shardings_are_followed(saved):
    net, params, folder = saved
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    for shardings in (sharding, jax.tree.map(lambda _: sharding, net.abstract_params)):
        loaded = load_params(net, folder, shardings=shardings, progress=False)
        assert_equal(loaded, params)
        assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))


def test_progress_bar_counts_every_byte_and_can_be_switched_off(saved, capfd):
    net, _, folder = saved
    load_params(net, folder)
    assert "Loading weights: 100%" in capfd.readouterr().err
    load_params(net, folder, progress=False)
    assert capfd.readouterr().err == ""


def test_check_params_names_everything(saved):
    net, params, _ = saved
    check_params(net, params)
    spoiled = jax.tree.map(lambda leaf: leaf, params)
    spoiled["norm"]["weight"] = np.ones(31, np.float32)
    spoiled["embed"]["weight"] = spoiled["embed"]["weight"].astype(jnp.bfloat16)
    del spoiled["layers"]["1"]["mlp"]["down"]
    spoiled["extra"] = {"weight": np.ones(1)}
    spoiled["lm_head"]["weight"] = "no array"
    with pytest.raises(CheckpointError) as error:
        check_params(net, spoiled)
    for line in (
        "5 problem(s)",
        "norm.weight: expected float32 [32], found float32 [31]",
        "embed.weight: expected float32 [64, 32], found bfloat16 [64, 32]",
        "missing: layers.1.mlp.down.weight, expected float32 [32, 48]",
        "unused: extra.weight",
        "lm_head.weight: expected an array",
    ):
        assert line in str(error.value)
    with pytest.raises(CheckpointError, match="nested dict of arrays, not a list"):
        check_params(net, [])


def test_every_weight_has_a_row_in_the_table():
    net = network()
    net.weight_names = tuple(row for row in net.weight_names if row[-1] != "k")
    with pytest.raises(ValueError, match=r"no row for.*'qkv'.*part 'k'"):
        checkpoint_slots(net)


PEAK = """
import re, sys, jax
from jaxllm.models import load_params
from tests.models.test_weights import large_network
def memory(field):  # of this process alone; getrusage's maximum would include its parent's, before exec
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
net = large_network()
jax.block_until_ready(jax.device_put(1.0))
before = memory("VmRSS")
params = load_params(net, sys.argv[1], progress=False)
print(memory("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def large_network():
    """36 MB of float32 in 4 layers of 9 MB."""
    return network(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=512)


def net_bytes(net):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(net.abstract_params))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_host_memory_over_the_arrays_is_under_one_shard(tmp_path):
    net = large_network()
    save_checkpoint(net, net.init(jax.random.key(0)), tmp_path)
    files = shard(tmp_path, 2)
    largest = max((tmp_path / file).stat().st_size for file in files)
    root = Path(__file__).parents[2]  # `tests` is importable from there
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1.3 * largest < net_bytes(net)
