"""Llama against transformers: every variant, and every way in which a runner may cut its work."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import ModelConfig, build, load_params  # noqa: E402
from tests.checkpoints import LLAMA_VARIANTS, save_checkpoint, tiny_llama  # noqa: E402
from tests.models.stepping import Stepper, greedy  # noqa: E402

TOLERANCE = 2e-3


def rope(rope_type, **settings):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
VARIANTS = {
    **LLAMA_VARIANTS,
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "rope_theta": rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope_linear": rope("linear", factor=4.0),
    "rope_dynamic": rope("dynamic", factor=2.0) | {"max_position_embeddings": 16},
    "rope_llama3": LLAMA3,
    "rope_yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "rope_yarn_scaled": rope(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=8.0,
        beta_slow=0.5,
        mscale=1.0,
        mscale_all_dim=0.5,
        truncate=False,
    ),
}


def load(tmp_path, **config):
    """(transformers' model, our network, its parameters)."""
    reference = tiny_llama(**config)
    folder = save_checkpoint(reference, tmp_path)
    network = build(ModelConfig.from_hf(reference.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    return reference, network, load_params(network, folder, progress=False)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


def reference_logits(model, tokens):
    """[T, V], every position of one forward pass."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def reference_greedy(model, tokens, num_tokens):
    return model.generate(torch.tensor([tokens]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[
        0, len(tokens) :
    ].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_greedy_decode(variant, tmp_path):
    reference, network, params = load(tmp_path, **VARIANTS[variant])
    tokens = prompt(21)  # longer than rope_dynamic's 16 positions
    stepper = Stepper(network, params)
    row = stepper.add(tokens)
    logits = stepper.step({row: len(tokens)})[row]
    np.testing.assert_allclose(logits, reference_logits(reference, tokens)[-1], atol=TOLERANCE)
    assert greedy(stepper, row, logits, 8) == reference_greedy(reference, tokens, 8)


def test_dynamic_rope_grows_past_the_trained_length_while_decoding(tmp_path):
    reference, network, params = load(tmp_path, **VARIANTS["rope_dynamic"])
    tokens = prompt(12)  # trained with 16 positions: decoding crosses them
    stepper = Stepper(network, params)
    row = stepper.add(tokens)
    logits = stepper.step({row: len(tokens)})[row]
    assert greedy(stepper, row, logits, 12) == reference_greedy(reference, tokens, 12)


@pytest.mark.parametrize("variant", ["gqa", "rope_dynamic"])
def test_chunked_prefill_equals_whole(variant, tmp_path):
    reference, network, params = load(tmp_path, **VARIANTS[variant])
    tokens = prompt(19)
    expected = reference_logits(reference, tokens)
    stepper = Stepper(network, params)
    row = stepper.add(tokens)
    computed = 0
    for count in (1, 6, 7, 5):
        computed += count
        logits = stepper.step({row: count})[row]
        np.testing.assert_allclose(logits, expected[computed - 1], atol=TOLERANCE)


@pytest.mark.parametrize("pad", [0, 3])
def test_mixed_step_of_decodes_prefills_and_a_chunk(pad, tmp_path):
    reference, network, params = load(tmp_path)
    prompts = [prompt(length, seed=length) for length in (5, 9, 7, 14)]
    stepper = Stepper(network, params)
    rows = [stepper.add(tokens) for tokens in prompts]
    # Rows 1 and 3 are prefilled first, so that afterwards decode rows do not simply come in the order of arrival.
    first = stepper.step({rows[1]: 9, rows[3]: 6}, pad=pad)
    stepper.append(rows[1], first[rows[1]].argmax())
    mixed = stepper.step({rows[0]: 5, rows[1]: 1, rows[2]: 7, rows[3]: 4}, pad=pad)
    sequences = [prompts[0], prompts[1] + [int(first[rows[1]].argmax())], prompts[2], prompts[3][:10]]
    for row, sequence in zip(rows, sequences, strict=True):
        np.testing.assert_allclose(mixed[row], reference_logits(reference, sequence)[-1], atol=TOLERANCE)
    assert set(stepper.step({rows[3]: 4}, pad=pad)) == {rows[3]}


def test_decode_only_step_equals_the_same_rows_in_a_mixed_step(tmp_path):
    _, network, params = load(tmp_path)
    steppers = [Stepper(network, params) for _ in range(2)]
    logits = []
    for stepper, decode_only in zip(steppers, (True, False), strict=True):
        rows = [stepper.add(prompt(length)) for length in (4, 11)]
        last = stepper.step(dict(zip(rows, (4, 11), strict=True)))
        for row in rows:
            stepper.append(row, last[row].argmax())
        logits.append(stepper.step(dict.fromkeys(rows, 1), decode_only=decode_only, pad=2))
    for row in (0, 1):
        np.testing.assert_allclose(logits[0][row], logits[1][row], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype, tmp_path):
    reference, _, _ = load(tmp_path)
    config = ModelConfig.from_hf(reference.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    network = build(config, dtype)
    stepper = Stepper(network, load_params(network, tmp_path, progress=False))
    row = stepper.add(prompt(10))
    logits = stepper.step({row: 10})[row]
    expected = reference_logits(reference, prompt(10))[-1]
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 0.1 * expected.std()
