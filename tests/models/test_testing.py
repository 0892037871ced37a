"""The running sum against plain Python, through every kind of step, and that it notices what it is there to notice."""

import jax
import numpy as np
import pytest

from jaxllm.models import ModelConfig, build, testing
from tests.models.stepping import Stepper, greedy


def stepper(num_layers=2, **kwargs):
    network = build(ModelConfig.from_hf(testing.config_dict(num_layers=num_layers)))
    return Stepper(network, network.init(jax.random.key(0)), **kwargs)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 32, length).tolist()


def test_the_example_of_the_docstring():
    assert testing.next_token([3, 4, 5], vocab_size=10) == 2
    assert testing.next_token([3, 4, 5], vocab_size=10, num_layers=1) == 12 % 10
    assert testing.continuation([3, 4, 5], 2, vocab_size=10, num_layers=1) == [2, 4]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_chunks_mixed_steps_and_decoding(num_layers):
    steps = stepper(num_layers)
    prompts = [prompt(9, 1), prompt(6, 2)]
    a, b = map(steps.add, prompts)
    steps.step({a: 4})
    logits = steps.step({a: 5}, pad=2)[a]
    assert logits.argmax() == testing.next_token(prompts[0], num_layers=num_layers)
    steps.append(a, logits.argmax())
    mixed = steps.step({a: 1, b: 6}, pad=1)
    assert greedy(steps, b, mixed[b], 5) == testing.continuation(prompts[1], 5, num_layers=num_layers)
    assert int(mixed[a].argmax()) == testing.continuation(prompts[0], 2, num_layers=num_layers)[1]


def test_exact_at_some_hundreds_of_tokens():
    tokens = prompt(800)
    steps = stepper(page_size=16, num_pages=64, table_width=64)
    row = steps.add(tokens)
    logits = steps.step({row: 700})[row]
    assert logits.max() == 0 and logits.argmax() == testing.next_token(tokens[:700])
    logits = steps.step({row: 100})[row]
    assert logits.max() == 0 and logits.argmax() == testing.next_token(tokens)


def test_a_wrong_page_gives_a_wrong_token():
    tokens = prompt(12)
    steps = stepper(page_size=4)
    row = steps.add(tokens)
    steps.step({row: 11})
    steps.rows[row].pages[1] = steps.free[0]
    assert steps.step({row: 1})[row].argmax() != testing.next_token(tokens)


def test_order_matters():
    assert testing.next_token([1, 2, 3]) != testing.next_token([3, 2, 1])


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"dtype='bfloat16'.*float32"):
        build(ModelConfig.from_hf(testing.config_dict()), "bfloat16")
