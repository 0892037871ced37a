"""The engine on a GPU: JAXLLM_TEST_GPU=1 python -m pytest -m gpu tests"""

import jax
import pytest

import jaxllm
from jaxllm.models.testing import continuation
from tests.jaxllm.conftest import make_sum_llm

pytestmark = pytest.mark.gpu
PROMPTS = [[(i * k + 1) % 32 for i in range(length)] for k, length in enumerate([1, 3, 15, 16, 17, 40, 90, 33], 1)]


def test_running_sums_are_exact():
    llm = make_sum_llm(block_size=8, num_gpu_blocks_override=24, max_num_batched_tokens=32, max_model_len=160)
    outputs = llm.generate(PROMPTS, {"temperature": 0, "max_tokens": 40}, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [continuation(prompt, 40) for prompt in PROMPTS]
    assert llm.llm_engine.scheduler.num_preemptions > 0


def test_default_model_with_the_memory_measured():
    llm = jaxllm.LLM(max_num_seqs=16, max_num_batched_tokens=256, dtype="float32", use_tqdm_on_load=False)
    runner = llm.llm_engine.runner
    stats = jax.devices()[0].memory_stats()
    assert runner.kv_bytes > 0.9 * stats["bytes_limit"] - 2**30 * 2
    params = jaxllm.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    prompts = [f"Chapter {i}. It was" for i in range(15)] + ["Once upon a time"]
    together = llm.generate(prompts, params, use_tqdm=False)[-1].outputs[0]
    assert together.token_ids == alone.token_ids
