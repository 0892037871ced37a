"""Quantized checkpoints against the same model on the values that their tensors mean."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.models import CheckpointError, build, check_params, load_params, read_config, save_checkpoint
from jaxllm.models.checkpoint_files import list_tensors
from jaxllm.models.weights import checkpoint_slots
from tests.models.quantization import formats
from tests.models.stepping import Stepper, greedy

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(stored, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


W8A8 = compressed("int-quantized", num_bits=8, strategy="channel")
W4A16 = compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)
CT_FP8 = compressed("float-quantized", num_bits=8, type="float", strategy="channel")

# name -> (quantization_config, the packer, its options)
VARIANTS = {
    "gptq": (GPTQ, formats.gptq, {}),
    "gptq 128": (GPTQ | {"group_size": 128}, formats.gptq, {"group_size": 128}),
    "gptq a scale a row": (GPTQ | {"group_size": -1}, formats.gptq, {"group_size": -1}),
    "gptq asym": (GPTQ | {"sym": False}, formats.gptq, {"sym": False}),
    "gptq desc_act": (GPTQ | {"desc_act": True}, formats.gptq, {"desc_act": True}),
    "gptq asym v2, by transformers' key": (
        GPTQ | {"sym": False, "format": "gptq_v2"},
        formats.gptq,
        {"sym": False, "v2": True},
    ),
    "gptq desc_act asym v2": (
        GPTQ | {"desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
        formats.gptq,
        {"desc_act": True, "sym": False, "v2": True},
    ),
    "gptq 8 bits": (GPTQ | {"bits": 8}, formats.gptq, {"bits": 8}),
    "gptq 8 bits asym a scale a row": (
        GPTQ | {"bits": 8, "sym": False, "group_size": -1, "desc_act": True},
        formats.gptq,
        {"bits": 8, "sym": False, "group_size": -1},
    ),
    "awq": (AWQ, formats.awq, {}),
    "awq 128": (AWQ | {"group_size": 128}, formats.awq, {"group_size": 128}),
    "fp8 tensor": (FP8, formats.fp8_tensor, {}),
    "fp8 blocks": (FP8_BLOCK, formats.fp8_block, {}),
    "w8a8": (W8A8, formats.ct_int8, {}),
    "w8a8 tensor": (
        compressed("naive-quantized", num_bits=8, strategy="tensor"), formats.ct_int8, {"strategy": "tensor"}
    ),
    "w4a16": (W4A16, formats.ct_packed, {}),
    "w4a16 asym by group": (
        compressed(
            "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False, actorder="group"
        ),
        formats.ct_packed,
        {"sym": False, "actorder": "group"},
    ),
    "w8a16 a scale a row": (
        compressed("pack-quantized", num_bits=8, strategy="channel"), formats.ct_packed, {"bits": 8, "group_size": -1}
    ),
    "compressed fp8": (CT_FP8, formats.ct_fp8, {}),
}  # fmt: skip


def write(folder, quantization, packer, options, **config):
    """A quantized checkpoint in `folder`; returns the float one that it means, as (network, parameters)."""
    config = CONFIG | config
    floats = build(read_config(config))
    rng = np.random.default_rng(0)
    quantized, values = {}, {}
    for name, slot in checkpoint_slots(floats).items():
        layer, _, last = name.rpartition(".")
        if ".layers." in name and "norm" not in name and not layer.endswith("gate") and last == "weight":
            tensors, values[name] = packer(rng, *slot.shape, **options)
            quantized |= {f"{layer}.{part}": np.ascontiguousarray(tensor) for part, tensor in tensors.items()}
        else:
            noise = rng.normal(0, 1, slot.shape).astype(np.float32)
            quantized[name] = values[name] = 1 + 0.2 * noise if "norm" in name else 0.1 * noise
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(quantized, folder / "model.safetensors")
    (folder / "floats").mkdir()
    save_file(values, folder / "floats" / "model.safetensors")
    return floats, load_params(floats, folder / "floats", progress=False)


def load(folder, dtype="float32"):
    network = build(read_config(json.loads((folder / "config.json").read_text())), dtype)
    return network, load_params(network, folder, progress=False)


def logits_and_tokens(network, params, count=24):
    stepper = Stepper(network, params)
    row = stepper.add(list(range(3, 20)))
    logits = stepper.step({row: 17})[row]
    return logits, greedy(stepper, row, logits, count)


def assert_same(given, expected):
    (logits, tokens), (wanted, wanted_tokens) = logits_and_tokens(*given), logits_and_tokens(*expected)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(logits, wanted, atol=2e-3)
    assert tokens == wanted_tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_model_on_dequantized_weights(variant, tmp_path):
    reference = write(tmp_path, *VARIANTS[variant])
    network, params = load(tmp_path)
    check_params(network, params)
    weights = params["layers"]["0"]["mlp"]["down"]["weight"]
    assert weights["codes"].nbytes * 4 <= 128 * 256 * 4  # packed: an eighth or a quarter of float32
    assert_same((network, params), reference)


def test_block_that_ends_within_a_merged_layer(tmp_path):
    # k and v have 64 rows, half a block each; the feed-forward layer has one block and a half.
    reference = write(tmp_path, *VARIANTS["fp8 blocks"], intermediate_size=192)
    assert_same(load(tmp_path), reference)


def test_biases_of_quantized_layers(tmp_path):
    reference = write(tmp_path, *VARIANTS["gptq"], attention_bias=True, mlp_bias=True)
    assert_same(load(tmp_path), reference)


# As published, scaled down, in float32. AutoGPTQ wrote a bias for every layer.
QWEN15_7B_CHAT = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
}
QWEN15_GPTQ = {
    "bits": 4,
    "damp_percent": 0.01,
    "desc_act": False,
    "group_size": 128,
    "model_file_base_name": "model",
    "model_name_or_path": None,
    "quant_method": "gptq",
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}


def test_qwen15_7b_chat_gptq_int4(tmp_path):
    options = {"group_size": 128}
    reference = write(tmp_path, QWEN15_GPTQ, formats.gptq, options, **QWEN15_7B_CHAT)
    layers = {"self_attn.o_proj": 128, "mlp.gate_proj": 256, "mlp.up_proj": 256, "mlp.down_proj": 128}
    biases = {f"model.layers.0.{name}.bias": np.zeros(size, np.float16) for name, size in layers.items()}
    rewrite(tmp_path, lambda tensors: tensors.update(biases))
    network, params = load(tmp_path)
    assert set(params["layers"]["0"]["attention"]["qkv"]) == {"weight", "bias"}
    assert_same((network, params), reference)


def test_layers_that_are_not_converted(tmp_path):
    name = "model.layers.0.mlp.down_proj"
    kept = FP8 | {"modules_to_not_convert": [name, "lm_head"]}
    reference, params = write(tmp_path, *VARIANTS["fp8 tensor"])
    values = load_file(tmp_path / "floats" / "model.safetensors")[f"{name}.weight"]
    rewrite(tmp_path, lambda tensors: (remove(tensors, name), tensors.update({f"{name}.weight": values})))
    configure(tmp_path, kept)
    network, loaded = load(tmp_path)
    assert loaded["layers"]["0"]["mlp"]["down"]["weight"].shape == (128, 256)
    assert_same((network, loaded), (reference, params))


def test_sixteen_bit_network_stays_near(tmp_path):
    reference = write(tmp_path, *VARIANTS["gptq"])
    expected, _ = logits_and_tokens(*reference, count=1)
    logits, _ = logits_and_tokens(*load(tmp_path, "bfloat16"), count=1)
    assert np.abs(logits - expected).max() < 0.1 * expected.std()


def test_random_weights_fit_the_declarations():
    for quantization, config in ((GPTQ | {"sym": False, "desc_act": True}, MOE), (FP8_BLOCK, {}), (W8A8, {})):
        network = build(read_config(CONFIG | config | {"quantization_config": quantization}))
        params = network.init(jax.random.key(0))
        check_params(network, params)
        logits, _ = logits_and_tokens(network, params, count=1)
        assert np.all(np.isfinite(logits)) and logits.std() > 0


def test_quantized_network_is_not_saved(tmp_path):
    network = build(read_config(CONFIG | {"quantization_config": GPTQ}))
    with pytest.raises(ValueError, match="quantized network cannot be saved"):
        save_checkpoint(network, network.init(jax.random.key(0)), tmp_path)


def rewrite(folder, change):
    tensors = {tensor.name: np.array(tensor.read()) for tensor in list_tensors(folder)}  # fp8 too
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def remove(tensors, prefix):
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def configure(folder, quantization):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


Q = "model.layers.0.self_attn.q_proj"
SPOILED = {
    "group size": (
        GPTQ | {"group_size": 64}, {}, ["q_proj.scales", "group_size=64", "[2, 128]", "found float16 [4, 128]"]),
    "bits": (GPTQ | {"bits": 8}, {}, ["q_proj.qweight", "bits=8", "[32, 128]", "found int32 [16, 128]"]),
    "no g_idx": (GPTQ | {"desc_act": True}, {f"{Q}.g_idx": None}, [f"missing: {Q}.g_idx", "desc_act=True"]),
    "no scales": (GPTQ, {f"{Q}.scales": None}, [f"missing: {Q}.scales"]),
    "dtype": (GPTQ, {f"{Q}.qweight": np.ones((16, 128), np.int16)}, ["expected int32", "found int16"]),
    "unused": (GPTQ, {f"{Q}.extra": np.ones(3, np.float32)}, [f"unused: {Q}.extra"]),
    "floats": (GPTQ, {f"{Q}.qweight": None, f"{Q}.weight": np.ones((128, 128), np.float32)}, [f"unused: {Q}.weight"]),
    "order": (GPTQ, {f"{Q}.g_idx": np.zeros(128, np.int32)}, [Q, "desc_act=false", "desc_act=true"]),
    "groups": (GPTQ | {"desc_act": True}, {f"{Q}.g_idx": np.zeros(128, np.int32)}, [Q, "group_size=32"]),
    "zeros": (GPTQ | {"checkpoint_format": "gptq_v2"}, {}, ["sym=true", "not all 8", "gptq or gptq_v2"]),
    "bias": (GPTQ, {f"{Q}.bias": np.ones(128, np.float16)}, [Q, "bias has values"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_fit_the_config(case, tmp_path):
    quantization, changes, texts = SPOILED[case]
    write(tmp_path, *VARIANTS["gptq"])

    def spoil(tensors):
        for name, value in changes.items():
            tensors.pop(name, None)
            tensors |= {} if value is None else {name: value}

    rewrite(tmp_path, spoil)
    configure(tmp_path, quantization)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    for text in texts:
        assert text in str(error.value)


def test_sizes_that_no_tensor_holds():
    with pytest.raises(ValueError, match=r"down_proj \[128, 100\].*100 inputs must be a multiple of 8"):
        build(read_config(CONFIG | {"intermediate_size": 100, "quantization_config": W4A16}))


def test_parts_of_a_merged_layer_must_be_alike():
    quantization = W8A8 | {"ignore": ["lm_head", "re:.*q_proj"]}
    with pytest.raises(ValueError, match=r"q_proj and .*k_proj are parts of one weight here"):
        build(read_config(CONFIG | {"quantization_config": quantization}))


@pytest.mark.parametrize("variant", ["gptq desc_act", "awq", "fp8 blocks", "w8a8"])
def test_experts_stay_packed(variant, tmp_path):
    reference = write(tmp_path, *VARIANTS[variant], **MOE)
    network, params = load(tmp_path)
    check_params(network, params)
    experts = params["layers"]["0"]["mlp"]["experts"]
    packed = sum(array.nbytes for array in jax.tree.leaves(experts))
    assert packed < 0.6 * 4 * (3 * 64 * 128) * 4  # of float32; a width of 64 is padded to 128 columns
    assert_same((network, params), reference)


def test_experts_must_be_quantized_alike():
    quantization = W8A8 | {"ignore": ["lm_head", "re:.*experts.2.up_proj", "re:.*gate$"]}
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj and .*experts\.2\.up_proj are parts of one weight"):
        build(read_config(CONFIG | MOE | {"quantization_config": quantization}))


def test_a_tensor_that_an_expert_lacks(tmp_path):
    write(tmp_path, *VARIANTS["gptq"], **MOE)
    name = "model.layers.0.mlp.experts.3.down_proj.scales"
    rewrite(tmp_path, lambda tensors: remove(tensors, name))
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load(tmp_path)
