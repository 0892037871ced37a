"""Mixtral, Qwen2-MoE and Qwen3-MoE against transformers, and what a mixture of experts owes its tokens."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from jaxllm.inspection import count_parameters  # noqa: E402
from jaxllm.models import CheckpointError, load_params, read_config, save_checkpoint  # noqa: E402
from jaxllm.models.registry import quantized  # noqa: E402
from tests.models import references as ref  # noqa: E402
from tests.models.stepping import Stepper  # noqa: E402

# Published configs, without keys of no effect on inference.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
TINY_MIXTRAL = MIXTRAL_8X7B | TINY | {"num_local_experts": 5}
SMALL_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
VARIANTS = {
    "mixtral": TINY_MIXTRAL,
    "qwen3-moe": QWEN3_30B_A3B | TINY | SMALL_EXPERTS | {"head_dim": 16},
    "qwen3-moe-dense-layers": QWEN3_30B_A3B
    | TINY
    | SMALL_EXPERTS
    | {"head_dim": 8, "norm_topk_prob": False, "decoder_sparse_step": 2},
    "qwen2-moe": QWEN15_MOE | TINY | SMALL_EXPERTS | {"shared_expert_intermediate_size": 20},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize("variant", ref.slow_but(("qwen3-moe",), VARIANTS))
def test_alone(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_alone(network, params, reference, ref.prompt(14, 96))


@pytest.mark.parametrize(("variant", "windows"), [("qwen3-moe", (5, 5)), ("qwen2-moe", (5, None))])
def test_each_familys_rule_for_windows(variant, windows, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant] | WINDOW)
    network, params = ref.open_checkpoint(tmp_path)
    assert network.config.windows == windows
    ref.check_alone(network, params, reference, ref.prompt(14, 96))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched(variant, tmp_path):
    reference = ref.made_by_transformers(tmp_path, VARIANTS[variant])
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (12, 19, 11)])


def test_a_token_does_not_depend_on_batch_mates_and_padding(tmp_path):
    ref.made_by_transformers(tmp_path, TINY_MIXTRAL)
    network, params = ref.open_checkpoint(tmp_path)
    tokens, answers = ref.prompt(9, 96), []
    for mates, pad in ((0, 0), (12, 5)):  # the mates all send every token to the same experts
        stepper = Stepper(network, params)
        row = stepper.add(tokens)
        counts = {stepper.add([3] * 8): 8 for _ in range(mates)} | {row: 9}
        answers.append(stepper.step(counts, pad=pad)[row])
    np.testing.assert_allclose(answers, [answers[0]] * 2, atol=1e-5)


def test_experts_are_stacked_and_saved_one_by_one(tmp_path):
    ref.made_by_transformers(tmp_path, TINY_MIXTRAL)
    network, params = ref.open_checkpoint(tmp_path)
    weight = params["layers"]["1"]["mlp"]["experts"]["gate_up"]["weight"]
    assert weight.shape == (5, 2 * 40, 32)
    names = {
        "w1": weight[3, :40],
        "w3": weight[3, 40:],
        "w2": params["layers"]["1"]["mlp"]["experts"]["down"]["weight"][3],
    }
    saved = save_checkpoint(network, params, tmp_path / "saved")
    for folder in (tmp_path / "model.safetensors", saved):
        with safe_open(folder, framework="numpy") as file:
            for name, expected in names.items():
                tensor = file.get_tensor(f"model.layers.1.block_sparse_moe.experts.3.{name}.weight")
                np.testing.assert_array_equal(tensor, expected)


def test_a_missing_expert_is_named(tmp_path):
    ref.made_by_transformers(tmp_path, TINY_MIXTRAL)
    network, _ = ref.open_checkpoint(tmp_path)
    larger = ref.build(read_config(TINY_MIXTRAL | {"num_local_experts": 6}))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.block_sparse_moe\.experts\.5\.w2\.weight"):
        load_params(larger, tmp_path, progress=False)
    assert load_params(network, tmp_path, progress=False)


def test_published_configs():
    mixtral, qwen3, qwen2 = map(read_config, (MIXTRAL_8X7B, QWEN3_30B_A3B, QWEN15_MOE))
    assert (mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.expert_size) == (8, 2, 14336)
    assert (qwen3.num_experts, qwen3.expert_size, qwen3.norm_topk_prob, qwen3.dense_layers) == (
        128,
        768,
        True,
        frozenset(),
    )
    assert (qwen3.attention_bias, qwen3.shared_expert_size) == (False, 0)
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.shared_expert_size) == (True, False, 5632)


def test_published_size_in_four_bits():
    """Experts are nearly all of it: 16 GiB rather than 57."""
    network = ref.build(quantized(read_config(QWEN3_30B_A3B), "int4"), "bfloat16")
    assert count_parameters(network) == 30_532_122_624
    num_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in network.specs.values())
    assert num_bytes < 0.29 * 2 * 30_532_122_624


@pytest.mark.parametrize("published", [MIXTRAL_8X7B, QWEN3_30B_A3B])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])  # transformers 5 writes the second for both
def test_either_name_of_the_number_of_experts(published, key):
    others = {name: value for name, value in published.items() if name not in ("num_experts", "num_local_experts")}
    assert read_config(others | {key: 24}).num_experts == 24
    with pytest.raises(ValueError, match=f"{key}=0 must be an integer"):
        read_config(others | {key: 0})


BAD = {
    "experts": (MIXTRAL_8X7B | {"num_local_experts": 0}, "num_local_experts=0 must be an integer >= 1"),
    "picked": (QWEN3_30B_A3B | {"num_experts_per_tok": 129}, "num_experts_per_tok=129 must be at most .* 128"),
    "norm": (QWEN3_30B_A3B | {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
    "dense": (
        QWEN3_30B_A3B | {"mlp_only_layers": [48]},
        r"mlp_only_layers=\[48\] must be a list of layers, from 0 to 47",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)
