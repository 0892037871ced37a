"""What sampling and prompt scoring need is part of the memory plan, measured as on a GPU with a made-up size."""

import gc

import jax
import pytest

from jaxllm.models import testing
from jaxllm.runner import kv_pool
from jaxllm.runner.controls import abstract_tables
from jaxllm.runner.prompt_logprobs import CHUNK
from tests.jaxllm.conftest import make_sum_llm

LIMIT, VOCABULARY = 1000 * 2**20, 50_000


def kv_bytes() -> int:
    return make_sum_llm(num_gpu_blocks_override=None, enforce_eager=True).llm_engine.runner.kv_bytes


@pytest.mark.slow
def test_tables_and_prompt_scoring_are_counted(monkeypatch):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}

    def device_memory(device):
        gc.collect()
        used = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
        return LIMIT, used, used

    monkeypatch.setattr(kv_pool, "device_memory", device_memory)
    small, config = kv_bytes(), testing.config_dict
    monkeypatch.setattr(testing, "config_dict", lambda: config(vocab_size=VOCABULARY))
    tables = sum(x.size * x.dtype.itemsize for x in abstract_tables(8, VOCABULARY))
    logits_of_a_chunk = CHUNK * VOCABULARY * 4
    assert small - kv_bytes() >= tables + logits_of_a_chunk - 0.02 * LIMIT  # pages come in round numbers


def test_what_does_not_depend_on_pages_is_compiled_while_they_are_counted(monkeypatch, caplog):
    monkeypatch.setattr(kv_pool, "device_memory", lambda device: (LIMIT, 0, 0))
    with caplog.at_level("DEBUG", logger="jaxllm.runner.executables"):
        runner = make_sum_llm(num_gpu_blocks_override=None, block_size=8).llm_engine.runner
    compiled = [record.args[0] for record in caplog.records if "lowered" in record.message]
    twice = {key for key in compiled if compiled.count(key) > 1}
    assert set(compiled) == set(runner.program_keys)
    assert twice == {runner.ladder.mixed[-1]}  # with two numbers of pages
