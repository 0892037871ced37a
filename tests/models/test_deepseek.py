"""DeepSeek-V2 and V3 against transformers."""

import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.numpy  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from jaxllm.models import read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# Published configs, without keys of no effect on inference.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3 = V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
TINY = {
    "first_k_dense_replace": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "kv_lora_rank": 24,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "torch_dtype": "float32",
    "v_head_dim": 10,
    "vocab_size": 96,
}
GROUPS = {"n_group": 4, "topk_group": 2}
TINY_V2_LITE = V2_LITE | TINY
TINY_V2 = V2 | TINY | GROUPS | {"q_lora_rank": 20, "routed_scaling_factor": 2.0}
TINY_V3 = V3 | TINY | GROUPS | {"q_lora_rank": 20}
for _config, _mscale in ((TINY_V2_LITE, 0.707), (TINY_V2, 0.5), (TINY_V3, 1.0)):
    _config["rope_scaling"] = V2_LITE["rope_scaling"] | {
        "factor": 8,
        "original_max_position_embeddings": 16,
        "mscale": _mscale,
        "mscale_all_dim": _mscale,
    }
VARIANTS = {"v2-lite": TINY_V2_LITE, "v2": TINY_V2, "v3": TINY_V3}


def add_to_checkpoint(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", ref.slow_but(("v3",), VARIANTS))
def test_alone(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    if variant == "v3":  # the layer that predicts a second token
        add_to_checkpoint(
            tmp_path, **{f"model.layers.2.{name}.weight": torch.zeros(2) for name in ("eh_proj", "enorm")}
        )
    network, params = ref.open_checkpoint(tmp_path)
    assert network.kv_shapes(5, 4) == (((5, 4, 24 + 8), None),) * 2
    ref.check_alone(network, params, reference, ref.prompt(19, 96))


@pytest.mark.parametrize("variant", ref.slow_but(("v2",), VARIANTS))
def test_batched(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (12, 19, 11)])


# With the published quantization_config. No size is a multiple of a block's, nor, for gate and up, of a tile's.
FP8_V3 = TINY_V3 | {
    "hidden_size": 160,
    "intermediate_size": 136,
    "moe_intermediate_size": 136,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
FLOATS_IN_V3 = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "shared_head")


def as_fp8_blocks(weight):
    """(e4m3 codes, weight_scale_inv, the values that they mean), by the rules of the published convert.py."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes, scales = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros((rows, columns), np.float32)
    values = np.zeros(weight.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = np.abs(weight[block]).max() / 448
            codes[block] = (weight[block] / scales[i, j]).astype(codes.dtype)
            values[block] = codes[block].astype(np.float32) * scales[i, j]
    return codes, scales, values


def make_fp8_checkpoint(folder):
    """V3 as published, experts and the layer that predicts a second token in fp8 too; returns transformers' model of
    the values."""
    from transformers import AutoModelForCausalLM

    floats = folder / "floats"
    ref.made_by_transformers(floats, {key: FP8_V3[key] for key in FP8_V3 if key != "quantization_config"})
    values = safetensors.numpy.load_file(floats / "model.safetensors")
    of_last = {name.replace("layers.1.", "layers.2."): value for name, value in values.items() if "layers.1." in name}
    ones = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
    tensors = {f"model.layers.2.{name}.weight": np.ones(2, np.float32) for name in ones}
    for name, value in (values | of_last).items():
        if value.ndim == 2 and not any(part in name for part in FLOATS_IN_V3):
            tensors[name], tensors[f"{name}_scale_inv"], values[name] = as_fp8_blocks(value)
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FP8_V3))
    kept = {name: value for name, value in values.items() if "layers.2." not in name}
    safetensors.numpy.save_file(kept, floats / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager")
    return ref.of_transformers(model.eval()), tensors


def test_fp8_as_published(tmp_path):
    reference, tensors = make_fp8_checkpoint(tmp_path)
    names = """self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj
        mlp.shared_experts.gate_proj mlp.experts.0.gate_proj mlp.experts.7.up_proj mlp.experts.7.down_proj"""
    assert {f"model.layers.1.{name}.weight_scale_inv" for name in names.split()} <= tensors.keys()
    assert "model.layers.1.mlp.gate.weight_scale_inv" not in tensors
    network, params = ref.open_checkpoint(tmp_path)
    layer = params["layers"]["1"]
    experts = layer["mlp"]["experts"]
    assert experts["gate_up"]["weight"]["codes"].shape == (8, -(-2 * 136 // 64), 2, 16, 128)  # four codes in each i32
    assert layer["attention"]["kv_b"]["weight"].dtype == np.float32  # see docs/quantization.md
    ref.check_alone(network, params, reference, ref.prompt(19, 96))


@pytest.mark.slow
def test_engine(tmp_path):
    reference = ref.made_by_transformers(tmp_path, TINY_V2)
    ref.check_engine(tmp_path, reference, [ref.prompt(length, 96) for length in (20, 5, 33)])


def test_correction_bias_has_a_say_in_the_choice_alone(tmp_path):
    from jaxllm.models.deepseek import DeepseekMoE, DeepseekV3Config

    config = DeepseekV3Config.from_hf(TINY_V3 | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2})
    layer = DeepseekMoE(config, np.float32)
    logits = np.linspace(-1, 1, 8, dtype=np.float32)[None]
    layer.gate.e_score_correction_bias.set_value(np.asarray([0, 9, 9, 0, 0, 0, 0, 0], np.float32))
    weights, experts = layer.route(logits)
    assert sorted(experts[0].tolist()) == [1, 2]
    scores = 1 / (1 + np.exp(-logits[0, np.asarray(experts[0])]))
    np.testing.assert_allclose(weights[0], 2.5 * scores / scores.sum(), rtol=1e-5)


def test_published_configs():
    lite, v2, v3 = map(read_config, (V2_LITE, V2, V3))
    assert (lite.query_latent_size, lite.latent_size, lite.rope_size, lite.num_groups) == (None, 512, 64, 1)
    assert abs(lite.attention_scale - 192**-0.5 * (0.1 * 0.707 * np.log(40) + 1) ** 2) < 1e-12
    assert (v2.num_groups, v2.groups_picked, v2.routed_scale, v2.rope.attention_factor) == (8, 3, 16.0, 1.0)
    assert (v3.num_experts, v3.shared_expert_size, sorted(v3.dense_layers)) == (256, 2048, [0, 1, 2])
    assert (v3.norm_topk_prob, v3.rope.interleaved, v3.rope.rotary_dim, v3.max_model_len) == (True, True, 64, 163840)


BAD = {
    "scores": (V3 | {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; allowed: sigmoid"),
    "method": (V2 | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported; allowed: greedy"),
    "normalized": (V2 | {"norm_topk_prob": True}, "norm_topk_prob=True is not supported; allowed: False"),
    "layers": (V2 | {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    "groups": (V3 | {"n_group": 7}, "n_group=7 must divide n_routed_experts=256"),
    "picked": (V3 | {"topk_group": 9}, "topk_group=9 must be at most n_group=8"),
    "latent": (V2 | {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    "rope": (V2 | {"qk_rope_head_dim": 7}, "head_dim=7"),
    "query latent": (V2 | {"q_lora_rank": 0}, "q_lora_rank=0 must be an integer >= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)
