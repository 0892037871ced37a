"""Sizes of the KV pool."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models import testing
from jaxllm.models.config import ModelConfig
from jaxllm.models.registry import build
from jaxllm.runner import kv_pool


def test_page_bytes():
    network = build(ModelConfig.from_hf(testing.config_dict(num_layers=3)), "float32")
    one_layer = sum(math.prod(shape) for shape in network.kv_shapes(1, 16)[0])
    assert kv_pool.page_bytes(network, 16, jnp.bfloat16) == 3 * one_layer * 2


@pytest.mark.parametrize("budget", [0, 5, 1000, 10**6, 123_456_789, 123_460_000])
def test_pages_in_rounds_down_by_less_than_two_percent(budget):
    pages = kv_pool.pages_in(budget, 10)
    assert budget / 10 * 0.98 - 1 <= pages <= budget / 10
    assert kv_pool.pages_in(pages * 10, 10) == pages


def test_small_differences_of_free_memory_do_not_change_the_pool():
    assert len({kv_pool.pages_in(70 * 2**30 + 2**20 * i, 2 * 2**20) for i in range(20)}) == 1


def test_one_sequence_must_fit():
    kv_pool.check_holds_one_sequence(4, 16, 64, 1000)
    with pytest.raises(kv_pool.OutOfMemory, match=r"max_model_len=65 tokens needs 5 KV pages .* lower .* at most 64"):
        kv_pool.check_holds_one_sequence(4, 16, 65, 1000)


def test_a_cpu_keeps_no_account():
    assert kv_pool.device_memory(jax.devices("cpu")[0]) is None
