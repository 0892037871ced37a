"""What an LLM can do besides answering: metrics, prefix cache, profiles, functions of its weights, sleep mode."""

import io

import jax
import numpy as np
import pytest
from tqdm import tqdm

import jaxllm
from jaxllm import LLM, EngineConfig, SamplingParams
from jaxllm.metrics import Counter, Gauge, Histogram
from jaxllm.models import testing
from jaxllm.models.testing import continuation
from tests.jaxllm.conftest import make_sum_llm

PROMPT = [5, 6, 7] * 20


def greedy(max_tokens=6, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def answer(llm) -> list[int]:
    return llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def llm():
    return make_sum_llm(max_num_seqs=2, max_num_batched_tokens=32)


def values(llm) -> dict[str, float]:
    return {one.name: one.value for one in llm.get_metrics() if isinstance(one, Counter | Gauge)}


def test_metrics_add_up(llm):
    before = values(llm)
    llm.generate([PROMPT, PROMPT], greedy(), use_tqdm=False)
    after = values(llm)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vllm:prompt_tokens"] == grown["vllm:prefix_cache_queries"] == 2 * len(PROMPT)
    assert grown["vllm:generation_tokens"] == 12
    assert grown["vllm:request_success"] == 2
    assert 0 <= grown["vllm:prefix_cache_hits"] < 2 * len(PROMPT)
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    (seconds,) = (one for one in llm.get_metrics() if one.name == "vllm:e2e_request_latency_seconds")
    assert isinstance(seconds, Histogram) and seconds.sum > 0
    assert seconds.buckets["+Inf"] == seconds.count == after["vllm:request_success"]
    assert list(seconds.buckets.values()) == sorted(seconds.buckets.values())


def test_metrics_of_a_running_request(llm):
    before = values(llm)
    stream = llm.stream(PROMPT, greedy(150))
    seen = len(next(stream).outputs[0].token_ids)
    during = values(llm)
    assert during["vllm:num_requests_running"] == 1 and during["vllm:kv_cache_usage_perc"] > 0
    assert during["vllm:generation_tokens"] - before["vllm:generation_tokens"] >= seen
    stream.close()
    aborted = [one for one in llm.get_metrics() if one.labels == {"finished_reason": "abort"}]
    assert [one.value for one in aborted] == [1]


def test_reset_prefix_cache(llm):
    def cached() -> int:
        return llm.generate(PROMPT, greedy(1), use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached() > 0
    assert llm.reset_prefix_cache()
    assert cached() == 0


def test_what_is_enqueued_is_answered_when_it_is_waited_for(llm):
    first = llm.enqueue([PROMPT, [4, 5]], greedy(5))
    assert llm.llm_engine.num_unfinished_requests == 2
    assert llm.generate(PROMPT[:9], greedy(30), use_tqdm=False)[0].outputs[0].token_ids == continuation(PROMPT[:9], 30)
    second = llm.enqueue({"prompt_token_ids": [8]}, [greedy(3)])
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == [*first, *second] and not llm._inboxes
    for output, prompt, count in zip(outputs, (PROMPT, [4, 5], [8]), (5, 5, 3), strict=True):
        assert output.finished and output.outputs[0].token_ids == continuation(prompt, count)
    assert llm.wait_for_completion() == []


def test_methods_that_there_are_none_of_are_named(llm):
    with pytest.raises(AttributeError, match=r"'LLM' object has no attribute 'collective_rpc': .*apply_model"):
        llm.collective_rpc("f")
    with pytest.raises(AttributeError, match=r"'LLM' object has no attribute 'genrate'$"):
        _ = llm.genrate
    assert not hasattr(llm, "update_weights") and llm.reset_mm_cache() is None
    with pytest.raises(ValueError, match="reset_running_requests must be False, got True"):
        llm.reset_prefix_cache(reset_running_requests=True)


def test_arguments_that_are_not_honoured_are_named(llm):
    assert llm.generate([1], greedy(1), use_tqdm=False, tokenization_kwargs=None)
    with pytest.raises(ValueError, match=r"tokenization_kwargs must be None, got \{'a': 1\}"):
        llm.generate([1], greedy(1), tokenization_kwargs={"a": 1})
    with pytest.raises(TypeError, match="no field 'tokenisation_kwargs': did you mean 'tokenization_kwargs'"):
        llm.enqueue([1], greedy(1), tokenisation_kwargs=None)
    with pytest.raises(ValueError, match="lora_request must be None"):
        llm.chat([{"role": "user", "content": "Hello"}], lora_request="adapter")
    with pytest.raises(ValueError, match='chat_template_content_format must be "auto" or "string", got \'openai\''):
        llm.chat([{"role": "user", "content": "Hello"}], chat_template_content_format="openai")
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_bar_of_the_caller_s_own(llm):
    made = []

    def bar(**options):
        made.append(tqdm(**options | {"file": io.StringIO()}))
        return made[0]

    llm.generate([PROMPT, PROMPT], greedy(1), use_tqdm=bar)
    assert made[0].n == made[0].total == 2


def test_apply_model_returns_what_the_function_returns(llm):
    (count,) = llm.apply_model(lambda params: sum(x.size for x in jax.tree.leaves(params)))
    assert count == sum(np.prod(spec.shape) for spec in llm.llm_engine.runner.network.specs.values())
    before = answer(llm)
    llm.apply_model(lambda params: jax.tree.map(lambda x: 0 * x, params))
    assert answer(llm) == before


@pytest.mark.parametrize("level", [1, 2])
def test_sleeping_frees_the_device_and_waking_restores_it(llm, level):
    before, runner = answer(llm), llm.llm_engine.runner
    old = jax.tree.leaves(llm.apply_model(lambda params: params)[0])
    llm.sleep(level)
    llm.sleep(level)  # is no harm
    assert runner.params is None and runner._kv is None and runner._host_sampling.tables is None
    for call in (lambda: answer(llm), lambda: llm.apply_model(len)):
        with pytest.raises(RuntimeError, match="asleep"):
            call()
    with pytest.raises(ValueError, match=r"tags must be among .* got \['lunch'\]"):
        llm.wake_up(["lunch"])
    llm.wake_up(["weights"])
    with pytest.raises(RuntimeError, match="without its kv_cache"):
        answer(llm)
    llm.wake_up()
    new = jax.tree.leaves(llm.apply_model(lambda params: params)[0])
    assert all(np.array_equal(a, b) and a.sharding == b.sharding for a, b in zip(old, new, strict=True))
    output = llm.generate(PROMPT, greedy(), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == before and output.num_cached_tokens == 0
    llm.llm_engine.scheduler.check()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("awake", ["weights", "kv_cache"])
def test_sleeping_while_partly_awake_frees_the_rest(llm, awake, level):
    before, runner = answer(llm), llm.llm_engine.runner
    llm.sleep()
    llm.wake_up([awake])
    llm.sleep(level)
    assert runner.params is None and runner._kv is None and runner._host_sampling.tables is None
    llm.wake_up([awake])
    with pytest.raises(RuntimeError, match="without its"):
        answer(llm)
    llm.wake_up()
    assert answer(llm) == before


def test_level_2_after_level_1_drops_what_the_host_keeps(llm):
    before, mode = answer(llm), llm.llm_engine._sleep_mode
    llm.sleep(1)
    assert mode._kept is not None
    llm.sleep(2)
    assert mode._kept is None
    llm.sleep(1)  # is too late to keep them
    llm.wake_up()
    assert answer(llm) == before


def test_sleep_refuses_what_it_cannot_do(llm):
    with pytest.raises(ValueError, match="level must be 1 or 2, got 3"):
        llm.sleep(3)
    stream = llm.stream(PROMPT, greedy(150))
    next(stream)
    with pytest.raises(RuntimeError, match="1 unfinished"):
        llm.sleep()
    with pytest.raises(ValueError, match=r"mode must be .abort.* got 'keep'"):
        llm.sleep(mode="keep")
    llm.sleep(mode="abort")
    assert [*stream][-1].outputs[0].finish_reason == "abort"
    llm.wake_up()
    (params,) = llm.apply_model(dict)
    fields = dict(dtype="float32", max_model_len=64, enforce_eager=True, num_gpu_blocks_override=8)
    in_memory = LLM(testing.config_dict(), params=params, **fields)
    with pytest.raises(ValueError, match="came from memory"):
        in_memory.sleep(2)


def test_profiles_are_written_where_the_environment_says(llm, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLLM_PROFILER_DIR", raising=False)
    with pytest.raises(ValueError, match="JAXLLM_PROFILER_DIR"):
        llm.start_profile()
    monkeypatch.setenv("JAXLLM_PROFILER_DIR", str(tmp_path))
    llm.start_profile()
    answer(llm)
    llm.stop_profile()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_from_engine_args():
    args = EngineConfig(
        model=testing.config_dict(), load_format="dummy", max_model_len=64, enforce_eager=True, use_tqdm_on_load=False
    )
    assert isinstance(jaxllm.LLM.from_engine_args(args), LLM)


def test_calls_while_a_stream_is_open(llm):
    """The steps of one call may end another's requests: nothing of them is lost."""
    alone = llm.generate(PROMPT, greedy(40), use_tqdm=False)[0].outputs[0].token_ids
    started, waiting = llm.stream(PROMPT, greedy(40)), llm.stream(PROMPT[:7], greedy(3))
    next(started)
    assert llm.generate(PROMPT, greedy(40), use_tqdm=False)[0].outputs[0].token_ids == alone
    assert [*started][-1].outputs[0].token_ids == alone
    assert [*waiting][-1].outputs[0].token_ids == testing.continuation(PROMPT[:7], 3)
    assert not llm._inboxes
