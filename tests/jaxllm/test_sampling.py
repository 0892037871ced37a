"""Sampling parameters through the whole engine, on a network whose logits plain Python knows.

Every request here has one right answer, which must not depend on how it was scheduled: alone or in a batch, in chunks,
preempted, ahead of the host or not.
"""

import numpy as np
import pytest
from scipy import special

from jaxllm import SamplingParams
from jaxllm.models.testing import continuation, next_token
from jaxllm.runner.controls import bitmask
from jaxllm.sampling_params import RepetitionDetectionParams, RequestOutputKind
from tests.jaxllm.conftest import make_sum_llm

V = 32
PROMPTS = [[(i * k + 1) % V for i in range(length)] for k, length in enumerate([1, 3, 15, 16, 17, 40, 90, 33], 1)]


def greedy(max_tokens=12, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def logits_after(tokens) -> np.ndarray:
    return -np.abs(next_token(tokens) - np.arange(V)).astype(np.float64)


def expected(prompt, params, stop_ids=()) -> list[int]:
    """What greedy decoding with these parameters gives, by numpy. Penalties that are sums of powers of 2 are exact."""
    answer = []
    while len(answer) < params.max_tokens:
        logits = logits_after([*prompt, *answer])
        for token, value in (params.logit_bias or {}).items():
            logits[token] += value
        counts = np.bincount(answer, minlength=V)
        seen = (counts > 0) | np.isin(np.arange(V), prompt)
        penalty = params.repetition_penalty
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        if params.allowed_token_ids is not None:
            logits[list(set(range(V)) - set(params.allowed_token_ids))] = -np.inf
        if len(answer) < params.min_tokens:
            logits[list(stop_ids)] = -np.inf
        answer.append(int(logits.argmax()))
        if answer[-1] in stop_ids and len(answer) >= params.min_tokens:
            break
    return answer


def answers(llm, prompts, params):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


MIXED = [
    greedy(40),
    greedy(40, presence_penalty=1.5),
    greedy(40, frequency_penalty=0.75, logit_bias={3: 2.5, 30: -100}),
    greedy(40, repetition_penalty=1.5, frequency_penalty=-0.5),
    greedy(40, allowed_token_ids=list(range(0, V, 3)), presence_penalty=2.0),
    greedy(40, logprobs=2),
    greedy(40, min_tokens=20, stop_token_ids=list(range(20)), presence_penalty=0.5),
    greedy(40, logits_processors=[lambda tokens, logits: logits], repetition_penalty=1.25),
]


def stop_ids(params):
    return params.stop_token_ids


@pytest.mark.parametrize("ahead", [True, False])
def test_answers_do_not_depend_on_batch_mates_chunks_or_preemption(sum_llm, ahead):
    wanted = [expected(prompt, params, stop_ids(params)) for prompt, params in zip(PROMPTS, MIXED, strict=True)]
    assert len({tuple(expected(PROMPTS[5], params, stop_ids(params))) for params in MIXED}) >= 5  # they matter
    assert answers(sum_llm, PROMPTS, MIXED) == wanted
    for prompt, params, tokens in zip(PROMPTS, MIXED, wanted, strict=True):
        assert answers(sum_llm, prompt, params) == [tokens]
    # 20 pages of 8 tokens for eight requests of up to 17 pages: they preempt one another all the time.
    small = make_sum_llm(
        block_size=8, num_gpu_blocks_override=20, max_num_batched_tokens=32, max_model_len=160, async_scheduling=ahead
    )
    assert answers(small, PROMPTS, MIXED) == wanted
    assert small.llm_engine.scheduler.num_preemptions > 0


def test_penalties_in_bursts_of_steps(sum_llm, monkeypatch):
    """Several steps are planned at once; the counts advance on the device between them."""
    loop = sum_llm.llm_engine._loop
    monkeypatch.setattr(loop, "_steps_in_a_burst", lambda: 7)
    params = greedy(40, frequency_penalty=0.5, presence_penalty=0.25)
    assert answers(sum_llm, PROMPTS[:3], params) == [expected(prompt, params) for prompt in PROMPTS[:3]]


def test_min_tokens_with_any_number_of_stop_tokens(sum_llm):
    params = greedy(20, min_tokens=7, stop_token_ids=list(range(1, V)))
    assert answers(sum_llm, PROMPTS[3], params) == [expected(PROMPTS[3], params, range(1, V))]
    assert answers(sum_llm, PROMPTS[3], params)[0][:7] == [0] * 7


# --- logits processors


def test_logits_processors_see_the_tokens_and_change_the_logits(sum_llm):
    seen = []

    def never_twice(prompt, tokens, logits):
        seen.append((prompt, list(tokens)))
        logits[tokens] = -np.inf
        return logits

    prompt = PROMPTS[4]
    mates = [greedy(30, logits_processors=[never_twice]), greedy(30), greedy(30, presence_penalty=1.0)]
    got = answers(sum_llm, [prompt, *PROMPTS[:2]], mates)
    reference = []
    for _ in range(30):
        logits = logits_after([*prompt, *reference])
        logits[reference] = -np.inf
        reference.append(int(logits.argmax()))
    assert got[0] == reference and len(set(reference)) == 30
    assert got[1] == continuation(PROMPTS[0], 30) and got[2] == expected(PROMPTS[1], mates[2])
    assert [len(tokens) for _, tokens in seen] == list(range(30)) and seen[7] == (prompt, reference[:7])


def test_processors_that_leave_no_token_end_the_request(sum_llm):
    params = greedy(6, logits_processors=[lambda tokens, logits: np.full_like(logits, -np.inf)])
    outputs = sum_llm.generate(PROMPTS[:2], [params, greedy(6)], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]


def test_bad_words_and_allowed_tokens_that_leave_nothing(default_llm):
    (yes,) = default_llm.get_tokenizer().encode(" yes", add_special_tokens=False)
    params = SamplingParams(allowed_token_ids=[yes], bad_words=["yes"])
    with pytest.raises(ValueError, match="allows nothing that bad_words does not forbid: allow another token"):
        default_llm.generate("Once", params, use_tqdm=False)


LEAVE_NOTHING = {
    "allowed": dict(allowed_token_ids=[5]),
    "ends before min_tokens": dict(min_tokens=3, stop_token_ids=[7]),
    "several": dict(allowed_token_ids=[5, 7], min_tokens=3, stop_token_ids=[7]),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fields", LEAVE_NOTHING.values(), ids=LEAVE_NOTHING)
def test_a_processor_and_masks_that_leave_nothing_end_the_request(sum_llm, fields, temperature):
    def seven(tokens, logits):
        return np.where(np.arange(len(logits)) == 7, logits, -np.inf)

    params = SamplingParams(temperature=temperature, seed=1, max_tokens=6, logits_processors=[seven], **fields)
    stuck, other = sum_llm.generate(PROMPTS[:2], [params, greedy(6)], use_tqdm=False)
    assert (stuck.outputs[0].finish_reason, stuck.outputs[0].token_ids) == ("error", [])
    assert other.outputs[0].token_ids == continuation(PROMPTS[1], 6)


@pytest.mark.parametrize("fails_at", [0, 3, 5])
def test_a_logits_processor_that_raises_ends_its_request_alone(sum_llm, fails_at, caplog):
    def fails(tokens, logits):
        if len(tokens) == fails_at:
            raise RuntimeError("no idea")
        return logits

    outputs = sum_llm.generate(PROMPTS[:2], [greedy(6, logits_processors=[fails]), greedy(6)], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error" and "no idea" in caplog.text
    assert outputs[0].outputs[0].token_ids == continuation(PROMPTS[0], 6)[:fails_at]
    assert outputs[1].outputs[0].token_ids == continuation(PROMPTS[1], 6)
    sum_llm.llm_engine.scheduler.check()


def test_masks_are_made_while_the_device_computes_the_forward_pass(sum_llm, monkeypatch):
    """In a step the network's program is handed over before the host's work, and the sampler's after it."""
    events, runner = [], sum_llm.llm_engine.runner

    class Odd:
        def mask(self, tokens):
            events.append("mask")
            return bitmask(range(1, V, 2), V)

    class Recorded:
        def __getitem__(self, key):
            return lambda *arguments: (events.append(type(key).__name__), programs[key](*arguments))[1]

    programs = runner.executables
    monkeypatch.setattr(runner, "executables", Recorded())
    monkeypatch.setattr(sum_llm.llm_engine._specs, "_constraints", lambda *_: (Odd(),))
    (answer,) = answers(sum_llm, PROMPTS[3], greedy(5))
    assert all(token % 2 for token in answer)
    assert events == ["StepShape", "mask", "SampleShape"] * 5


def test_a_constraint_that_raises_ends_its_request_alone(sum_llm, monkeypatch):
    class Fails:
        def mask(self, tokens):
            raise RuntimeError("no idea")

    specs = sum_llm.llm_engine._specs
    monkeypatch.setattr(specs, "_constraints", lambda params, *_: (Fails(),) if params.seed == 1 else ())
    outputs = sum_llm.generate(PROMPTS[:2], [greedy(6, seed=1), greedy(6)], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert outputs[1].outputs[0].token_ids == continuation(PROMPTS[1], 6)


# --- log probabilities


def test_chosen_log_probabilities_and_ranks(sum_llm):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=8, logprob_token_ids=[0, 31, 7])
    output = sum_llm.generate(PROMPTS[2], params, use_tqdm=False)[0].outputs[0]
    for i, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        reference = special.log_softmax(logits_after(PROMPTS[2] + output.token_ids[:i]))
        assert set(entry) == {token, 0, 31, 7}
        for one in entry:
            assert entry[one].logprob == pytest.approx(reference[one], abs=1e-4)
        assert entry[token].rank == np.sum(reference >= reference[token] - 1e-9)


@pytest.fixture(scope="module")
def whole_llm():
    return make_sum_llm(max_logprobs=-1, max_num_seqs=4, max_model_len=700, max_num_batched_tokens=600)


def test_the_whole_vocabulary(whole_llm):
    params = greedy(3, logprobs=-1, prompt_logprobs=-1)
    output = whole_llm.generate([1, 2, 3, 4], params, use_tqdm=False)[0]
    tokens = [1, 2, 3, 4, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for i, entry in enumerate(entries, 1):
        reference = special.log_softmax(logits_after(tokens[:i]))
        assert sorted(entry) == list(range(V))
        np.testing.assert_allclose([entry[token].logprob for token in range(V)], reference, atol=1e-4)
        assert sorted(one.rank for token, one in entry.items() if token != tokens[i])[-1] <= V


def test_the_whole_vocabulary_of_an_engine_that_sorts_it():
    llm = make_sum_llm(max_logprobs=V, enforce_eager=True)
    output = llm.generate([1, 2, 3], greedy(2, logprobs=-1), use_tqdm=False)[0].outputs[0]
    assert [sorted(entry) for entry in output.logprobs] == [list(range(V))] * 2


def check_prompt_logprobs(output, count):
    prompt = output.prompt_token_ids
    assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
    for i in range(1, len(prompt)):
        reference, entry = special.log_softmax(logits_after(prompt[:i])), output.prompt_logprobs[i]
        assert entry[prompt[i]].logprob == pytest.approx(reference[prompt[i]], abs=1e-4)
        top = np.sort(reference)[::-1][:count]
        got = sorted((one.logprob for one in entry.values()), reverse=True)[:count]
        np.testing.assert_allclose(got, top, atol=1e-4)
        assert count <= len(entry) <= count + 1


def test_prompt_logprobs_are_those_of_a_plain_forward_pass(sum_llm):
    """In chunks of at most 64 tokens, beside others, with the prefix cache full of these prompts."""
    answers(sum_llm, PROMPTS, greedy(2))
    params = [greedy(3, prompt_logprobs=2) if i % 2 else greedy(3) for i in range(8)]
    outputs = sum_llm.generate(PROMPTS, params, use_tqdm=False)
    for output, one in zip(outputs, params, strict=True):
        assert output.outputs[0].token_ids == continuation(output.prompt_token_ids, 3)
        if one.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            check_prompt_logprobs(output, 2)
            assert output.num_cached_tokens == 0


def test_more_prompt_positions_in_a_step_than_are_scored_at_once(whole_llm):
    prompts = [[(i * k) % 31 for i in range(length)] for k, length in ((1, 290), (3, 200), (5, 105), (7, 600))]
    for output in whole_llm.generate(prompts, greedy(1, prompt_logprobs=1), use_tqdm=False):
        check_prompt_logprobs(output, 1)


def test_prompt_logprobs_of_preempted_requests():
    llm = make_sum_llm(block_size=8, num_gpu_blocks_override=20, max_num_batched_tokens=32, max_model_len=160)
    outputs = llm.generate(PROMPTS, greedy(40, prompt_logprobs=0), use_tqdm=False)
    assert llm.llm_engine.scheduler.num_preemptions > 0
    for output in outputs:
        check_prompt_logprobs(output, 0)
        assert output.outputs[0].token_ids == continuation(output.prompt_token_ids, 40)


def test_prompt_token_id_logprobs(sum_llm):
    prompt, wanted, start = PROMPTS[6], [5, 0, 31], 70
    params = greedy(1, prompt_logprob_token_ids=wanted, prompt_logprob_start=start)
    matrix = sum_llm.generate(prompt, params, use_tqdm=False)[0].prompt_token_id_logprobs
    assert matrix.shape == (len(prompt) - 1 - start, 3) and matrix.dtype == np.float32
    for row, got in enumerate(matrix):
        np.testing.assert_allclose(got, special.log_softmax(logits_after(prompt[: start + row + 1]))[wanted], atol=1e-4)
    both = greedy(1, prompt_logprob_token_ids=wanted, prompt_logprob_start=start, prompt_logprobs=1)
    output = sum_llm.generate(prompt, both, use_tqdm=False)[0]
    np.testing.assert_array_equal(output.prompt_token_id_logprobs, matrix)
    check_prompt_logprobs(output, 1)
    far = greedy(1, prompt_logprob_token_ids=wanted, prompt_logprob_start=500)
    assert sum_llm.generate(prompt, far, use_tqdm=False)[0].prompt_token_id_logprobs.shape == (0, 3)


# --- several answers


def test_best_of_returns_the_likeliest(sum_llm):
    prompt, fields = [5] * 40, dict(temperature=1.5, seed=7, max_tokens=6)
    everything = sum_llm.generate(prompt, SamplingParams(n=6, logprobs=0, **fields), use_tqdm=False)[0].outputs
    assert len({tuple(one.token_ids) for one in everything}) == 6
    output = sum_llm.generate(prompt, SamplingParams(n=2, best_of=6, **fields), use_tqdm=False)[0]
    likeliest = sorted(everything, key=lambda one: one.cumulative_logprob, reverse=True)[:2]
    assert [one.token_ids for one in output.outputs] == [one.token_ids for one in likeliest]
    assert [one.index for one in output.outputs] == [one.index for one in likeliest]
    assert all(one.logprobs is None for one in output.outputs)
    assert [one.cumulative_logprob for one in output.outputs] == pytest.approx(
        [one.cumulative_logprob for one in likeliest]
    )


@pytest.mark.parametrize("fields", [dict(n=4), dict(n=1, best_of=4), dict(n=4, prompt_logprobs=0)], ids=str)
def test_answers_share_the_prompts_pages(fields):
    llm = make_sum_llm()
    prompt = [3] * 200  # 13 pages of 16
    for output in llm.stream(prompt, SamplingParams(temperature=1.0, max_tokens=3, **fields)):
        if not output.finished and len(llm.llm_engine.scheduler.residents) == 4:
            held = llm.llm_engine.runner.num_pages - llm.llm_engine.scheduler.memory.pool.num_free
            assert held <= 12 + 4 * 2
            break
    else:
        raise AssertionError("the four were never resident together")


def test_prompt_logprobs_of_several_answers(sum_llm):
    params = SamplingParams(temperature=1.0, n=3, max_tokens=2, prompt_logprobs=1, seed=1)
    check_prompt_logprobs(sum_llm.generate(PROMPTS[6], params, use_tqdm=False)[0], 1)


# --- ends, kinds of output, prompts


@pytest.mark.parametrize("burst", [1, 9])
def test_a_repetition_ends_the_answer(sum_llm, monkeypatch, burst):
    monkeypatch.setattr(sum_llm.llm_engine._loop, "_steps_in_a_burst", lambda: burst)
    params = greedy(30, allowed_token_ids=[4, 5], repetition_detection={"max_pattern_size": 2, "min_count": 4})
    whole = expected(PROMPTS[3], greedy(30, allowed_token_ids=[4, 5]))
    detection = params.repetition_detection
    end = next(i for i in range(31) if detection.found_in(whole[:i]))
    output = sum_llm.generate(PROMPTS[3], params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == whole[:end] and end < 30
    assert (output.finish_reason, output.stop_reason) == ("repetition", "repetition_detected")


def test_repetitions_by_hand():
    detection = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=2, min_count=3)
    assert detection.found_in([9, 1, 2, 1, 2, 1, 2])
    assert detection.found_in([1, 2, 3] * 3) and not detection.found_in([1, 2, 3] * 3 + [4])
    assert not detection.found_in([1, 2, 1, 2]) and not detection.found_in([7, 7, 7, 7, 7])
    assert detection.found_in([7] * 6)
    assert not RepetitionDetectionParams().found_in([1] * 9)


def test_output_kinds(sum_llm):
    whole = continuation(PROMPTS[2], 12)

    def streamed(kind):
        return list(sum_llm.stream(PROMPTS[2], greedy(12, output_kind=kind, logprobs=0)))

    cumulative, delta = streamed(RequestOutputKind.CUMULATIVE), streamed(RequestOutputKind.DELTA)
    assert cumulative[-1].outputs[0].token_ids == whole and len(cumulative) > 1
    assert [t for output in delta for t in output.outputs[0].token_ids] == whole and len(delta) > 1
    assert [len(output.outputs[0].logprobs) for output in delta] == [len(o.outputs[0].token_ids) for o in delta]
    (final,) = streamed(RequestOutputKind.FINAL_ONLY)
    assert final.finished and final.outputs[0].token_ids == whole


def test_several_streams_at_once(sum_llm, monkeypatch):
    monkeypatch.setattr(sum_llm.llm_engine._loop, "_steps_in_a_burst", lambda: 1)
    seen = []
    params = [greedy(12), SamplingParams(temperature=0, max_tokens=20), SamplingParams(n=2, seed=1, max_tokens=9)]
    shown = {str(i): [0] for i in range(3)}
    for output in sum_llm.stream(PROMPTS[1:4], params):
        seen.append(output.request_id)
        shown[output.request_id].append(sum(len(one.token_ids) for one in output.outputs))
        if output.finished and output.request_id != "2":
            count = params[int(output.request_id)].max_tokens
            assert output.outputs[0].token_ids == continuation(output.prompt_token_ids, count)
    assert [counts[-1] for counts in shown.values()] == [12, 20, 18]
    assert all(counts == sorted(counts) and len(counts) > 9 for counts in shown.values())
    assert seen != sorted(seen)  # they took turns


def test_truncate_prompt_tokens(sum_llm):
    output = sum_llm.generate(PROMPTS[6], greedy(4, truncate_prompt_tokens=10), use_tqdm=False)[0]
    assert output.prompt_token_ids == PROMPTS[6][-10:]
    assert output.outputs[0].token_ids == continuation(PROMPTS[6][-10:], 4)
    long = [1, 2] * 200
    output = sum_llm.generate(long, greedy(4, truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert output.prompt_token_ids == long[-255:] and len(output.outputs[0].token_ids) == 1


def test_skip_reading_prefix_cache(sum_llm):
    prompt = [9] * 60
    answers(sum_llm, prompt, greedy(1))
    assert sum_llm.generate(prompt, greedy(1), use_tqdm=False)[0].num_cached_tokens == 48
    skipping = greedy(1, skip_reading_prefix_cache=True)
    assert sum_llm.generate(prompt, skipping, use_tqdm=False)[0].num_cached_tokens == 0


def test_extra_args_reach_the_policy():
    import jaxllm

    class ByCost(jaxllm.Policy):
        def key(self, request):
            return (request.data["cost"], request.index)

    llm = make_sum_llm(max_num_seqs=1, scheduling_policy=ByCost())
    params = [greedy(2, extra_args={"cost": cost}) for cost in (3, 1, 2)]
    finished = [output.metrics.finished_time for output in llm.generate([[1], [2], [3]], params, use_tqdm=False)]
    assert finished[1] < finished[2] < finished[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(allowed_token_ids=[32]), "allowed_token_ids: 32 is out of range: the vocabulary has ids 0 to 31"),
        (dict(logit_bias={40: 1}), "logit_bias: 40 is out of range"),
        (dict(logprob_token_ids=[99]), "logprob_token_ids: 99 is out of range"),
        (dict(prompt_logprob_token_ids=[99]), "prompt_logprob_token_ids: 99 is out of range"),
        (dict(logprobs=-1), "logprobs=-1 exceeds the engine's max_logprobs=20"),
        (dict(prompt_logprobs=21), "prompt_logprobs=21 exceeds the engine's max_logprobs=20"),
        (dict(prompt_logprob_token_ids=list(range(21))), "the number of prompt_logprob_token_ids, 21, exceeds"),
        (
            dict(allowed_token_ids=[5, 6], stop_token_ids=[6, 5], min_tokens=3),
            r"allowed_token_ids=\[5, 6\] allows nothing that stop_token_ids does not forbid before min_tokens=3",
        ),
        (dict(bad_words=["x"]), "bad_words .strings. needs a tokenizer"),
        (dict(thinking_token_budget=5), "thinking_token_budget=5 needs a tokenizer"),
    ],
    ids=str,
)
def test_what_the_engine_refuses(sum_llm, fields, message):
    with pytest.raises(ValueError, match=message):
        sum_llm.generate([1, 2], greedy(**fields), use_tqdm=False)
