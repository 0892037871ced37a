"""After warm-up nothing is ever compiled, whatever the workload: a test of serving speed that needs no GPU.

JAX itself is asked, so that a stray operation outside of the step's programs counts as well."""

import jax.monitoring
import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.models.testing import continuation
from tests.jaxllm.conftest import make_sum_llm

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the programs that XLA compiles, or takes from the cache on disk."""

    def __init__(self):
        self.count = 0

    def __call__(self, event: str, seconds: float, **kwargs) -> None:
        self.count += event == BACKEND_COMPILE


@pytest.fixture
def compilations():
    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.fixture(scope="module")
def llm():
    """Small pages and few of them: long requests preempt one another."""
    return make_sum_llm(block_size=4, num_gpu_blocks_override=64, max_num_batched_tokens=48, max_num_seqs=4)


def test_the_counter_counts(compilations):
    jax.jit(lambda x: x * 3 + len("never compiled before"))(np.arange(7))
    assert compilations.count == 1


def test_programs_are_the_ladder_and_one_more(llm):
    runner = llm.llm_engine.runner
    assert len(runner.executables) == len(runner.program_keys) == len(set(runner.program_keys))


def random_params(random) -> SamplingParams:
    def one_of(*values):
        return values[random.integers(len(values))]

    max_tokens = int(random.integers(1, 40))
    temperature = one_of(0.0, 0.0, 0.7, 1.5)
    return SamplingParams(
        n=one_of(1, 1, 2, 3) if temperature else 1,
        temperature=temperature,
        top_p=one_of(1.0, 0.9),
        top_k=one_of(0, 1, 5, 1000),
        min_p=one_of(0.0, 0.1),
        seed=one_of(None, 7),
        max_tokens=max_tokens,
        min_tokens=int(random.integers(0, max_tokens)),
        stop_token_ids=one_of(None, [3]),
        logprobs=one_of(None, 0, 5, 20),
        prompt_logprobs=one_of(None, None, 0, 3),
        presence_penalty=one_of(0.0, 0.0, 0.5),
        repetition_penalty=one_of(1.0, 1.0, 1.2),
        logit_bias=one_of(None, None, {5: 2.0}),
        allowed_token_ids=one_of(None, None, list(range(30))),
        logits_processors=one_of(None, None, None, [lambda tokens, logits: logits]),
    )


def add_requests(engine, random, step: int) -> None:
    """Some prompts, which often begin alike."""
    beginnings = [[(i * k) % 32 for i in range(150)] for k in (1, 3, 5)]
    for i in range(random.integers(1, 6)):
        prompt = beginnings[random.integers(3)][: random.integers(1, 150)]
        engine.add_request(f"{step}.{i}", prompt, random_params(random), streaming=bool(random.integers(2)))


def test_a_mixed_workload_compiles_nothing(llm, compilations):
    engine, random = llm.llm_engine, np.random.default_rng(0)
    outputs, aborted = [], 0
    for step in range(300):
        if random.random() < 0.3:
            add_requests(engine, random, step)
        if engine.has_unfinished_requests() and random.random() < 0.1:
            engine.abort_request(str(random.choice(list(engine._groups))))
            aborted += 1
        outputs += engine.step()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    engine.drain()
    prompt = [1, 2, 3] * 7
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == continuation(prompt, 5)

    engine.scheduler.check()
    assert {answer.finish_reason for output in outputs for answer in output.outputs} == {None, "stop", "length"}
    assert engine.scheduler.num_preemptions > 10 and engine.scheduler.memory.hit_tokens > 100 and aborted > 10
    assert compilations.count == 0
    assert len(engine.runner.executables) == len(engine.runner.program_keys)
