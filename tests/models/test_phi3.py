"""Phi-3 and Phi-4-mini: fused projections, odd windows, LongRoPE for each request by its length."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402
from tests.models.stepping import Stepper  # noqa: E402

# The published config of Phi-3-mini-4k-instruct, without keys of no effect on inference.
PHI3_MINI_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


def longrope(half: int) -> dict:
    short, long = (np.linspace(1.0, top, half).round(3).tolist() for top in (1.5, 30.0))
    return {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}


PHI3_MINI_128K = (
    PHI3_MINI_4K | longrope(48) | {"max_position_embeddings": 131072, "sliding_window": 262144, "num_hidden_layers": 32}
)
PHI4_MINI = PHI3_MINI_128K | {
    **longrope(48),
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 64,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
TINY_128K = PHI3_MINI_128K | TINY | longrope(4) | {"sliding_window": 41}
TINY_PHI4 = PHI4_MINI | TINY | longrope(3)


def test_equals_transformers_with_an_odd_window(tmp_path):
    config = PHI3_MINI_4K | TINY | {"sliding_window": 7}
    reference = ref.made_by_transformers(tmp_path, config)
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (12, 19, 11)])


@pytest.mark.slow
@pytest.mark.parametrize("length", [21, 65, 90])  # the trained length is 64
def test_longrope_by_length(length, tmp_path):
    reference = ref.made_by_transformers(tmp_path, TINY_PHI4)
    network, params = ref.open_checkpoint(tmp_path)
    ref.check_alone(network, params, reference, ref.prompt(length, 96))


def test_longrope_is_each_requests_own_and_independent_of_chunks(tmp_path):
    reference = ref.made_by_transformers(tmp_path, TINY_128K)
    network, params = ref.open_checkpoint(tmp_path)
    short, long = ref.prompt(40, 96), ref.prompt(70, 96)
    stepper = Stepper(network, params)
    rows = stepper.add(short), stepper.add(long)
    stepper.step(dict(zip(rows, (13, 30), strict=True)))
    logits = stepper.step(dict(zip(rows, (27, 40), strict=True)))
    for row, tokens in zip(rows, (short, long), strict=True):
        np.testing.assert_allclose(logits[row], reference(tokens, [])[-1], atol=ref.TOLERANCE)


def test_a_sequence_that_outgrows_the_trained_length_keeps_its_keys(tmp_path):
    """As transformers does when it is called token by token, without the recomputation of its `generate`."""
    ref.made_by_transformers(tmp_path, TINY_PHI4)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    network, params = ref.open_checkpoint(tmp_path)
    tokens = ref.prompt(70, 96)
    stepper = Stepper(network, params)
    row = stepper.add(tokens[:62])
    ours = [stepper.step({row: 62})[row]]
    with torch.no_grad():
        state = model(torch.tensor([tokens[:62]]), use_cache=True)
        theirs = [state.logits[0, -1].numpy()]
        for token in tokens[62:]:
            stepper.append(row, token)
            ours.append(stepper.step({row: 1}, decode_only=True)[row])
            state = model(torch.tensor([[token]]), cache=state.cache, use_cache=True)
            theirs.append(state.logits[0, -1].numpy())
    np.testing.assert_allclose(ours, theirs, atol=ref.TOLERANCE)


def test_published_configs():
    mini, long, phi4 = map(read_config, (PHI3_MINI_4K, PHI3_MINI_128K, PHI4_MINI))
    assert (set(mini.windows), mini.rope.rope_type, mini.max_model_len) == ({2047}, "default", 4096)
    assert (long.rope.rope_type, long.rope.max_positions, long.max_model_len) == ("longrope", 4096, 131072)
    assert abs(long.rope.attention_factor - (1 + np.log(32) / np.log(4096)) ** 0.5) < 1e-12
    assert [long.kv_depends_on_prompt_len(length) for length in (4096, 4097)] == [False, True]
    assert (phi4.rope.rotary_dim, phi4.tie_word_embeddings) == (96, True)
    su = PHI3_MINI_128K | {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | {"type": "su"}}
    assert read_config(su) == long


def scaled(**changes):
    return PHI3_MINI_128K | {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | changes}


BAD = {
    "missing": (scaled(long_factor=None), "long_factor is missing"),
    "too few": (scaled(short_factor=[1.0] * 47), "short_factor=.* must be a list of 48 finite numbers > 0"),
    "zero": (scaled(long_factor=[0] * 48), "long_factor=.* must be a list of 48"),
    "text": (scaled(long_factor="high"), "long_factor='high' must be a list"),
    "mscale": (scaled(short_mscale=1.0), "short_mscale=1.0 is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)
