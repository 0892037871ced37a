"""The engine on a network whose answers plain Python knows: every wrong page or position would change them."""

import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.engine import LLMEngine
from jaxllm.models.testing import continuation
from jaxllm.sampling_params import RequestOutputKind
from jaxllm.scheduling import Policy
from tests.jaxllm.conftest import make_sum_llm

PROMPTS = [[(i * k + 1) % 32 for i in range(length)] for k, length in enumerate([1, 3, 15, 16, 17, 40, 90, 33], 1)]


def greedy(max_tokens=12, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def answers(llm, prompts, params):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_alone_and_together(sum_llm):
    expected = [continuation(prompt, 12) for prompt in PROMPTS]
    assert [answers(sum_llm, prompt, greedy())[0] for prompt in PROMPTS] == expected
    assert answers(sum_llm, PROMPTS * 3, greedy()) == expected * 3


@pytest.mark.parametrize("ahead", [True, False])
def test_chunks_prefixes_and_preemption(ahead):
    # 20 pages of 8 tokens for eight requests of up to 17 pages: they preempt one another all the time.
    llm = make_sum_llm(
        block_size=8, num_gpu_blocks_override=20, max_num_batched_tokens=32, max_model_len=160, async_scheduling=ahead
    )
    expected = [continuation(prompt, 40) for prompt in PROMPTS]
    assert answers(llm, PROMPTS, greedy(40)) == expected
    assert llm.llm_engine.scheduler.num_preemptions > 0
    for _ in range(2):
        assert answers(llm, PROMPTS[6], greedy(40)) == [expected[6]]
    assert llm.llm_engine.scheduler.memory.hit_tokens >= 88
    llm.llm_engine.scheduler.check()


@pytest.mark.parametrize("fields", [dict(temperature=1.0, top_k=2**40), dict(temperature=0, min_tokens=2**40)], ids=str)
def test_numbers_too_large_for_the_device_disturb_nobody(sum_llm, fields):
    params = [greedy(8), SamplingParams(max_tokens=8 if "top_k" in fields else None, **fields)]
    good, large = sum_llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert good.outputs[0].token_ids == continuation(PROMPTS[0], 8)
    assert large.outputs[0].finish_reason == "length"


def test_an_end_of_sequence_that_the_model_has_no_token_for(sum_llm):
    engine = LLMEngine(sum_llm.llm_engine.runner, None, (32, 7))
    assert engine.eos_token_ids == (7,)
    engine.add_request("a", [3, 4, 5], greedy(4, min_tokens=2))
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[0].outputs[0].finish_reason == "length"


class Deadlines(Policy):
    def key(self, request):
        return request.data["deadline"]


def test_requests_are_queued_all_or_none(monkeypatch):
    llm = make_sum_llm(scheduling_policy="priority")
    engine, params = llm.llm_engine, greedy(4)
    with pytest.raises(TypeError, match="priority must be an integer, got 'high'"):
        llm.generate(PROMPTS[:3], params, priority=[0, "high", 1], use_tqdm=False)
    with pytest.raises(TypeError, match="request_id must be text, got 5"):
        engine.add_request(5, PROMPTS[0], params)
    monkeypatch.setattr(engine.scheduler, "policy", Deadlines())
    late = greedy(4, extra_args={"deadline": 1})
    with pytest.raises(KeyError):
        llm.generate(PROMPTS[:2], [late, params], use_tqdm=False)
    with pytest.raises(KeyError):
        engine.add_request("n", PROMPTS[0], SamplingParams(n=2, max_tokens=3))
    assert engine.num_unfinished_requests == engine._num_watched == 0
    assert not engine.scheduler.has_unfinished and not engine._of_request
    engine.scheduler.check()
    assert answers(llm, PROMPTS[0], late) == [continuation(PROMPTS[0], 4)]


def test_a_token_that_could_not_be_sampled_is_no_part_of_the_answer(default_llm):
    def fails(tokens, logits):
        if len(tokens) == 3:
            raise ArithmeticError("no")
        return logits

    for fields in ({}, dict(stop=["zzz"]), dict(logprobs=1)):
        params = SamplingParams(temperature=0, max_tokens=8, logits_processors=[fails], **fields)
        (answer,) = default_llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs
        assert (answer.finish_reason, len(answer.token_ids)) == ("error", 3)
        assert answer.text == default_llm.get_tokenizer().decode(answer.token_ids)
        assert answer.logprobs is None or len(answer.logprobs) == 3


def test_a_finished_answer_is_told_once(default_llm):
    params = SamplingParams(n=3, seed=5, max_tokens=12, stop=[" the"], output_kind=RequestOutputKind.DELTA)
    engine, told = default_llm.llm_engine, []
    engine.add_request("a", "Once upon a time", params)
    while engine.has_unfinished_requests():
        told += [(one.index, one.finish_reason) for output in engine.step() for one in output.outputs]
    ends = [told.index((index, reason)) for index, reason in set(told) if reason is not None]
    assert len(ends) == 3
    for at in ends:
        assert all(index != told[at][0] for index, _ in told[at + 1 :])


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: None])
def test_a_stream_that_is_never_iterated_leaves_nothing(sum_llm, leave):
    leave(sum_llm.stream(PROMPTS[:2], greedy(4)))
    assert sum_llm.llm_engine.num_unfinished_requests == 0 and not sum_llm._inboxes
    with pytest.raises(ValueError, match="out of range"):
        sum_llm.stream([99], greedy(4))


def test_long_prefix_hits_overflow_what_a_step_carries():
    llm = make_sum_llm(block_size=1, num_gpu_blocks_override=600, max_num_batched_tokens=32, max_num_seqs=2)
    prompt = [i % 7 for i in range(200)]
    expected = continuation(prompt, 5)
    assert answers(llm, prompt, greedy(5)) == [expected]
    output = llm.generate(prompt, greedy(5), use_tqdm=False)[0]
    assert output.num_cached_tokens == 199 and output.outputs[0].token_ids == expected


def test_stop_token(sum_llm):
    tokens = continuation(PROMPTS[2], 12)
    stop = tokens[4]
    output = sum_llm.generate(PROMPTS[2], greedy(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_min_tokens_keeps_a_stop_token_from_being_sampled(sum_llm):
    stop = continuation(PROMPTS[2], 1)[0]
    output = sum_llm.generate(PROMPTS[2], greedy(6, min_tokens=3, stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert stop not in output.token_ids[:3] and len(output.token_ids) >= 3


def test_length(sum_llm):
    output = sum_llm.generate(PROMPTS[0], greedy(5), use_tqdm=False)[0]
    assert output.outputs[0].finish_reason == "length" and output.finished
    assert output.prompt is None and output.prompt_token_ids == PROMPTS[0]
    long = sum_llm.generate([1] * 250, greedy(100), use_tqdm=False)[0].outputs[0]
    assert len(long.token_ids) == 6 and long.finish_reason == "length"  # max_model_len is 256


def test_metrics_are_in_order(sum_llm):
    metrics = sum_llm.generate(PROMPTS[1], greedy(3), use_tqdm=False)[0].metrics
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times) and metrics.time_in_queue >= 0


def test_logprobs(sum_llm):
    output = sum_llm.generate(PROMPTS[3], greedy(4, logprobs=3), use_tqdm=False)[0].outputs[0]
    assert len(output.logprobs) == 4
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entry) == 3 and entry[token].rank == 1
        assert entry[token].logprob == max(one.logprob for one in entry.values())
    assert output.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    )
    only_own = sum_llm.generate(PROMPTS[3], greedy(1, logprobs=0), use_tqdm=False)[0].outputs[0]
    assert [list(entry) for entry in only_own.logprobs] == [only_own.token_ids]


def test_n_answers_share_the_prompt(sum_llm):
    prompt = [3] * 40
    likeliest = SamplingParams(temperature=1, top_k=1, max_tokens=5, n=3)
    output = sum_llm.generate(prompt, likeliest, use_tqdm=False)[0]
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert all(one.token_ids == continuation(prompt, 5) for one in output.outputs)


def test_stream_grows_to_what_generate_returns(sum_llm):
    seen = {}
    for output in sum_llm.stream(PROMPTS[:3], greedy()):
        tokens = output.outputs[0].token_ids
        assert tokens[: len(seen.get(output.request_id, []))] == seen.get(output.request_id, [])
        seen[output.request_id] = tokens
    assert [seen[str(i)] for i in range(3)] == [continuation(prompt, 12) for prompt in PROMPTS[:3]]


def test_leaving_a_stream_ends_its_requests(sum_llm):
    for _ in sum_llm.stream(PROMPTS, greedy(100)):
        break
    engine = sum_llm.llm_engine
    assert not engine.has_unfinished_requests() and not engine.scheduler.has_unfinished
    assert engine.scheduler.memory.pool.num_free == engine.runner.num_pages
    assert answers(sum_llm, PROMPTS[0], greedy()) == [continuation(PROMPTS[0], 12)]


def test_abort(sum_llm):
    engine = sum_llm.llm_engine
    for i, prompt in enumerate(PROMPTS[:4]):
        engine.add_request(f"r{i}", prompt, greedy(20), streaming=False)
    engine.step()
    engine.abort_request(["r1", "unknown"])
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    engine.drain()
    assert finished == {f"r{i}": continuation(PROMPTS[i], 20) for i in (0, 2, 3)}


def test_a_failed_step_fails_its_requests_and_not_the_engine(monkeypatch, caplog):
    llm = make_sum_llm(max_num_seqs=2)
    runner = llm.llm_engine.runner
    submit, calls = runner.submit, []

    def fails_once(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise RuntimeError("the device caught fire")
        return submit(plan)

    monkeypatch.setattr(runner, "submit", fails_once)
    outputs = llm.generate(PROMPTS[:4], greedy(), use_tqdm=False)  # two run, two wait
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error", "length", "length"]
    assert [output.outputs[0].token_ids for output in outputs[2:]] == [continuation(p, 12) for p in PROMPTS[2:4]]
    assert "the device caught fire" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, ValueError, "the prompt is empty"),
        ([1] * 256, {}, ValueError, r"the prompt has 256 tokens; max_model_len is 256"),
        ([1, 32], {}, ValueError, r"prompt_token_ids\[1\]=32 is out of range: the vocabulary has ids 0 to 31"),
        ([-1], {}, ValueError, r"prompt_token_ids\[0\]=-1"),
        ([1.5], {}, TypeError, "prompt must be text, a sequence of int token ids"),
        ({"promt": "x"}, {}, ValueError, r"\['promt'\]"),
        ("text", {}, ValueError, "no tokenizer"),
        ([1], {"logprobs": 21}, ValueError, "logprobs=21 exceeds the engine's max_logprobs=20"),
        ([1], {"stop_token_ids": [32]}, ValueError, "stop_token_ids: 32 is out of range"),
        ([1], {"stop": "x"}, ValueError, "stop .strings. needs a tokenizer"),
        ([1], {"temperatur": 1}, TypeError, "did you mean 'temperature'"),
    ],
)
def test_bad_input_harms_nobody(sum_llm, prompt, params, error, message):
    engine = sum_llm.llm_engine
    engine.add_request("good", PROMPTS[1], greedy(6), streaming=False)
    engine.step()
    with pytest.raises(error, match=message):
        engine.add_request("bad", prompt, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.outputs[0].token_ids for output in outputs] == [continuation(PROMPTS[1], 6)]


def test_prompt_forms(sum_llm):
    expected = continuation([1, 2, 3], 4)
    for prompt in ([1, 2, 3], (1, 2, 3), {"prompt_token_ids": [1, 2, 3]}, [[1, 2, 3]]):
        assert answers(sum_llm, prompt, greedy(4)) == [expected]
    assert sum_llm.llm_engine.prepare(np.array([1, 2, 3])).prompt_token_ids == [1, 2, 3]


def test_params_forms(sum_llm):
    prompts = [[1, 2], [3]]
    lengths = [len(ids) for ids in answers(sum_llm, prompts, [greedy(3), {"temperature": 0, "max_tokens": 5}])]
    assert lengths == [3, 5]
    assert [len(ids) for ids in answers(sum_llm, prompts, None)] == [16, 16]
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 prompts"):
        sum_llm.generate(prompts, [greedy()])
    with pytest.raises(ValueError, match="priority has 1 entries for 2 prompts"):
        sum_llm.generate(prompts, greedy(), priority=[1])
    with pytest.raises(TypeError, match="prompts must be a prompt or a sequence of prompts, got 5"):
        sum_llm.generate(5)


def test_priority_decides_who_goes_first():
    llm = make_sum_llm(max_num_seqs=1, scheduling_policy="priority")
    outputs = llm.generate([[1], [2], [3]], greedy(2), use_tqdm=False, priority=[3, 1, 2])
    finished = [output.metrics.finished_time for output in outputs]
    assert finished[1] < finished[2] < finished[0]


def test_a_model_longer_than_the_kv_cache_is_shortened_unless_the_length_was_asked_for(caplog):
    llm = make_sum_llm(max_model_len=None, num_gpu_blocks_override=4)
    assert llm.llm_engine.config.max_model_len == 64 and "max_model_len lowered" in caplog.text
    assert answers(llm, [1] * 60, greedy(10)) == [continuation([1] * 60, 4)]
    with pytest.raises(
        RuntimeError, match=r"max_model_len=65 tokens needs 5 KV pages .* lower max_model_len to at most 64"
    ):
        make_sum_llm(max_model_len=65, num_gpu_blocks_override=4)
