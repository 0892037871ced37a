"""What a quantization_config may say, and how a bad one is answered; NumPy alone, no network."""

import pytest

from jaxllm.models.quantization import METHODS, choose, read_quantization
from tests.models.quantization.test_checkpoints import AWQ, CT_FP8, FP8, FP8_BLOCK, GPTQ, W4A16, W8A8


def read(quantization):
    return read_quantization({"quantization_config": quantization})


def weights_of(config, **changes):
    """A compressed-tensors config with other settings of its weights."""
    group = config["config_groups"]["group_0"]
    return config | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


BAD = {
    "no object": ("gptq", ["quantization_config='gptq'", "object"]),
    "method": ({"quant_method": "hqq"}, ["quantization_config.quant_method='hqq'", "gptq, awq, fp8"]),
    "no method": ({"bits": 4}, ["quantization_config.quant_method is missing", "gptq"]),
    "bits": (GPTQ | {"bits": 3}, ["quantization_config.bits=3", "allowed: 4, 8"]),
    "no bits": (GPTQ | {"bits": None}, ["quantization_config.bits is missing"]),
    "group": (GPTQ | {"group_size": 48}, ["quantization_config.group_size=48", "32, 64, 128"]),
    "group of another type": (GPTQ | {"group_size": "128"}, ["group_size='128'"]),
    "sym": (GPTQ | {"sym": 1}, ["quantization_config.sym=1", "true, false"]),
    "format": (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format='marlin'", "gptq, gptq_v2"]),
    "dynamic": (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, ["dynamic['+:.*']", "-:"]),
    "awq bits": (AWQ | {"bits": 8}, ["bits=8", "allowed: 4"]),
    "awq version": (AWQ | {"version": "gemv"}, ["version='gemv'", "gemm"]),
    "awq zeros": (AWQ | {"zero_point": False}, ["zero_point=False", "allowed: true"]),
    "awq names": (AWQ | {"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert='lm_head'", "list"]),
    "fp8 type": (FP8 | {"fmt": "e5m2"}, ["fmt='e5m2'", "e4m3"]),
    "fp8 blocks": (FP8_BLOCK | {"weight_block_size": [64, 64]}, ["weight_block_size=[64, 64]", "[128, 128]"]),
    "fp8 activations": (FP8 | {"activation_scheme": "none"}, ["activation_scheme='none'", "static, dynamic"]),
    "no groups": (W8A8 | {"config_groups": {}}, ["config_groups is missing"]),
    "stored": (W8A8 | {"format": "marlin-24"}, ["format='marlin-24'", "pack-quantized"]),
    "kv": (W8A8 | {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme", "null"]),
    "num_bits": (weights_of(W4A16, num_bits=2), ["config_groups.group_0.weights.num_bits=2", "4, 8"]),
    "strategy": (weights_of(CT_FP8, strategy="group"), ["weights.strategy='group'", "tensor, channel, block"]),
    "asymmetric": (weights_of(W8A8, symmetric=False), ["weights.symmetric=False", "allowed: true"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_key_the_value_and_what_is_allowed(case):
    quantization, texts = BAD[case]
    with pytest.raises(ValueError) as error:
        read(quantization)
    for text in texts:
        assert text in str(error.value)


def test_unquantized():
    assert read_quantization({}) is None and read_quantization({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("quantization", "kept", "converted"),
    [
        (GPTQ | {"dynamic": {r"-:.*\.mlp\..*": {}}}, "layers.0.mlp.up_proj", "layers.0.self_attn.q_proj"),
        (AWQ | {"modules_to_not_convert": ["gate", "visual"]}, "layers.0.mlp.gate", "layers.0.mlp.gate_proj"),
        (FP8 | {"ignored_layers": ["model.layers.1"]}, "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        (W8A8 | {"ignore": ["re:.*down_proj", "lm_head"]}, "layers.3.mlp.down_proj", "layers.3.mlp.up_proj"),
    ],
)  # fmt: skip
def test_layers_that_stay_as_they_are(quantization, kept, converted):
    found = read(quantization)
    assert found.scheme(kept) is None and found.scheme(converted) is not None


def test_groups_of_layers_with_schemes_of_their_own():
    config = W4A16 | {
        "config_groups": {
            "group_0": W4A16["config_groups"]["group_0"] | {"targets": [r"re:.*self_attn.*"]},
            "group_1": W8A8["config_groups"]["group_0"] | {"format": "int-quantized"},
        }
    }
    found = read(config)
    assert found.scheme("model.layers.0.self_attn.q_proj").layout.format == "int4"
    assert found.scheme("model.layers.0.mlp.up_proj").layout.format == "int8"


def test_a_layers_name_goes_before_a_pattern_and_that_before_all_layers():
    int4, int8 = W4A16["config_groups"]["group_0"], W8A8["config_groups"]["group_0"] | {"format": "int-quantized"}
    config = W4A16 | {
        "config_groups": {
            "group_0": int4 | {"targets": ["Linear", "model.layers.1.mlp.up_proj"]},
            "group_1": int8 | {"targets": [r"re:.*up_proj$"]},
        }
    }
    formats = [read(config).scheme(f"model.layers.{name}").layout.format for name in ("0.mlp.up_proj", "1.mlp.up_proj")]
    assert formats == ["int8", "int4"]
    assert read(config).scheme("model.layers.0.mlp.down_proj").layout.format == "int4"


def test_what_the_user_wants_and_what_the_checkpoint_has():
    gptq = read(GPTQ)
    assert choose(None, None) is None and choose(gptq, None) is gptq and choose(gptq, "gptq") is gptq
    assert choose(read(FP8), "fp8").kept is not None  # a checkpoint of that kind is taken as it is
    assert [choose(None, method).method for method in ("int8", "fp8", "int4")] == ["int8", "fp8", "int4"]
    with pytest.raises(ValueError, match=r"quantization='awq'.*its method is gptq"):
        choose(gptq, "awq")
    with pytest.raises(ValueError, match=r"quantization='awq'.*not quantized.*int8, fp8, int4"):
        choose(None, "awq")
    with pytest.raises(ValueError, match=r"quantization='int3' is not supported; allowed: int8"):
        choose(None, "int3")


def test_engine_setting_offers_every_method():
    from jaxllm.config import QUANTIZATIONS

    assert QUANTIZATIONS == METHODS
