"""The beams' bookkeeping against an exhaustive search and by hand; the engine's beam search beside other requests."""

import itertools
import math

import numpy as np
import pytest

from jaxllm import BeamSearchParams, SamplingParams
from jaxllm.beam_search import BeamSearch, num_candidates
from jaxllm.models.testing import continuation
from jaxllm.sampling_params import RequestOutputKind
from tests.jaxllm.conftest import make_sum_llm

STOP = 0


def chain(size, seed):
    """Log probabilities [position, token before, token] of a Markov chain; token 0 is before the first."""
    logits = np.random.default_rng(seed).normal(size=(12, size, size))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def search(logprobs, width, max_tokens, is_over=None, **fields):
    """Beams are tuples of tokens; STOP ends one."""
    beams = BeamSearch((), width, max_tokens, **fields)
    beams._is_over = is_over or beams._is_over
    while not beams.done:
        rows = [logprobs[len(beam.item), beam.item[-1] if beam.item else 0] for beam in beams.running]
        count = num_candidates(width, 1)
        candidates = [[(int(token), row[token]) for token in np.argsort(-row)[:count]] for row in rows]
        beams.extend(candidates, lambda beam, token: ((*beam, token), token == STOP))
    return beams


def all_answers(logprobs, max_tokens, length_penalty):
    """[(score, tokens)] of every answer that there is, best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(logprobs.shape[-1]), repeat=length):
            if STOP not in tokens[:-1] and (tokens[-1] == STOP or length == max_tokens):
                steps = zip(range(length), (0, *tokens), tokens, strict=False)
                total = sum(logprobs[step] for step in steps)
                found.append((total / length**length_penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 0.6, 1.0, 2.0])
def test_a_search_wide_enough_finds_the_best_answers(length_penalty):
    for seed in range(5):
        logprobs = chain(4, seed)
        beams = search(logprobs, 81, 4, length_penalty=length_penalty, early_stopping="never")
        expected = all_answers(logprobs, 4, length_penalty)
        assert [one.item for one in beams.finished[:20]] == [tokens for _, tokens in expected[:20]]
        np.testing.assert_allclose([one.score for one in beams.finished[:20]], [score for score, _ in expected[:20]])


def test_never_misses_nothing_that_going_on_would_find():
    for seed, width in itertools.product(range(20), (2, 3)):
        how = dict(length_penalty=1.5, early_stopping="never")
        stopped = search(chain(6, seed), width, 9, **how)
        to_the_end = search(chain(6, seed), width, 9, **how, is_over=lambda: False)
        assert to_the_end.length >= stopped.length and to_the_end.finished == stopped.finished


def test_early_stopping_ends_as_soon_as_it_may():
    lengths = {
        how: [search(chain(6, seed), 3, 12, early_stopping=how).length for seed in range(10)]
        for how in (True, False, "never")
    }
    assert all(a <= b <= c for a, b, c in zip(lengths[True], lengths[False], lengths["never"], strict=True))
    assert sum(lengths[True]) < sum(lengths[False]) < sum(lengths["never"])


def test_only_the_first_width_extensions_may_end():
    beams = BeamSearch("", 2, 5)
    beams.extend([[(1, -0.1), (2, -0.2), (STOP, -0.3), (3, -0.4)]], lambda beam, token: (f"{token}", token == STOP))
    assert beams.finished == [] and [beam.item for beam in beams.running] == ["1", "2"]
    beams = BeamSearch("", 2, 5)
    beams.extend([[(1, -0.1), (STOP, -0.2), (2, -0.3), (3, -0.4)]], lambda beam, token: (f"{token}", token == STOP))
    assert [one.item for one in beams.finished] == ["0"] and [beam.item for beam in beams.running] == ["1", "2"]


def test_tokens_that_may_not_follow_are_left_out():
    beams = BeamSearch("", 3, 5)
    beams.extend([[(1, -0.1), (2, -math.inf), (3, math.nan)]], lambda beam, token: (token, False))
    assert [beam.item for beam in beams.running] == [1] and not beams.done
    beams.extend([[(1, -math.inf)]], lambda beam, token: (token, False))
    assert beams.done and beams.finished == []


@pytest.mark.parametrize(("width", "stops", "expected"), [(4, 0, 8), (4, 1, 8), (2, 3, 5)])
def test_candidates_outnumber_stop_tokens(width, stops, expected):
    assert num_candidates(width, stops) == expected


# --- in the engine


@pytest.fixture(scope="module")
def llm():
    return make_sum_llm(block_size=4, num_gpu_blocks_override=96, enforce_eager=True)


def beam_params(width, max_tokens=9, **fields):
    return SamplingParams(
        **dict(use_beam_search=True, best_of=width, n=width, temperature=0, max_tokens=max_tokens) | fields
    )


PROMPT = [(7 * i + 1) % 32 for i in range(22)]


def tokens_of(output):
    return [one.token_ids for one in output.outputs]


def test_the_best_beam_of_a_certain_model_is_its_greedy_answer(llm):
    output = llm.generate(PROMPT, beam_params(3), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == continuation(PROMPT, 9) and len(output.outputs) == 3
    scores = [one.cumulative_logprob for one in output.outputs]
    assert scores == sorted(scores, reverse=True) and [one.index for one in output.outputs] == [0, 1, 2]
    assert all(one.finish_reason == "length" and len(one.token_ids) == 9 for one in output.outputs)
    assert len({tuple(tokens) for tokens in tokens_of(output)}) == 3


@pytest.mark.parametrize("ahead", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_beside_other_requests_and_without_memory(ahead):
    """Beams and ordinary requests that preempt one another give what each gives alone; no page is left behind."""
    settings = dict(block_size=4, async_scheduling=ahead, enforce_eager=True)
    roomy = make_sum_llm(num_gpu_blocks_override=96, **settings)
    prompts = [[3] * 9, [1], PROMPT, [5, 6, 7], PROMPT[:13]]
    params = [SamplingParams(temperature=0, max_tokens=30), SamplingParams(temperature=1, seed=3, max_tokens=30)]
    params += [beam_params(4), beam_params(3, n=1), beam_params(5)]
    alone = [roomy.generate(one, how, use_tqdm=False)[0] for one, how in zip(prompts, params, strict=True)]
    assert tokens_of(alone[0]) == [continuation([3] * 9, 30)]
    tight = make_sum_llm(num_gpu_blocks_override=14, max_model_len=50, max_num_seqs=4, **settings)
    for engine in (roomy, tight):
        together = engine.generate(prompts, params, use_tqdm=False)
        assert [tokens_of(output) for output in together] == [tokens_of(output) for output in alone]
        scheduler = engine.llm_engine.scheduler
        scheduler.check()
        assert not scheduler.has_unfinished and scheduler.memory.pool.num_free == engine.llm_engine.runner.num_pages
    assert tight.llm_engine.scheduler.num_preemptions > 0


def test_beams_share_full_pages(llm):
    """In a step each beam computes its last, partial page alone."""
    computed = []
    submit = llm.llm_engine.runner.submit

    def counted(plan):
        computed.append((len(plan.slots), int(plan.num_tokens.sum())))
        return submit(plan)

    llm.llm_engine.runner.submit = counted
    try:
        llm.generate(PROMPT, beam_params(4, max_tokens=20), use_tqdm=False)
    finally:
        llm.llm_engine.runner.submit = submit
    assert [rows for rows, _ in computed] == [1] + [4] * 19
    assert all(tokens <= 4 * 4 for _, tokens in computed[1:])
    assert sum(tokens for _, tokens in computed[1:]) / sum(rows for rows, _ in computed[1:]) < 3


def test_stop_tokens_end_beams(llm):
    first = continuation(PROMPT, 9)
    stop = first[4]
    output = llm.generate(PROMPT, beam_params(3, stop_token_ids=[stop]), use_tqdm=False)[0]
    best = next(one for one in output.outputs if one.finish_reason == "stop")
    assert best.stop_reason == stop and stop not in best.token_ids[:-1]
    later = llm.generate(PROMPT, beam_params(3, stop_token_ids=[stop], min_tokens=7), use_tqdm=False)[0]
    assert all(stop not in one.token_ids[:6] for one in later.outputs)


def test_allowed_tokens_bias_and_processors_decide_what_is_found(llm):
    allowed = llm.generate(PROMPT, beam_params(3, allowed_token_ids=[4, 9]), use_tqdm=False)[0]
    assert {token for tokens in tokens_of(allowed) for token in tokens} == {4, 9}
    biased = llm.generate(PROMPT, beam_params(2, logit_bias={11: 100}), use_tqdm=False)[0]
    assert biased.outputs[0].token_ids == [11] * 9

    def only_twelve(tokens, logits):
        return np.where(np.arange(len(logits)) == 12, 0.0, -1e9)

    processed = llm.generate(PROMPT, beam_params(2, logits_processors=[only_twelve]), use_tqdm=False)[0]
    assert processed.outputs[0].token_ids == [12] * 9
    assert processed.outputs[0].cumulative_logprob == pytest.approx(0, abs=1e-5)


def test_a_processor_that_fails_ends_its_search_alone(llm):
    def fails_late(tokens, logits):
        if len(tokens) == 3:
            raise RuntimeError("no")
        return logits

    outputs = llm.generate(
        [PROMPT, [1, 2]], [beam_params(3, logits_processors=[fails_late]), beam_params(2)], use_tqdm=False
    )
    assert {one.finish_reason for one in outputs[0].outputs} == {"error"}
    assert all(len(tokens) == 3 for tokens in tokens_of(outputs[0]))
    assert outputs[1].outputs[0].token_ids == continuation([1, 2], 9)
    assert not llm.llm_engine.has_unfinished_requests()


def test_nothing_may_follow(llm):
    stuck = beam_params(2, logits_processors=[lambda tokens, logits: np.full_like(logits, -np.inf)])
    assert [one.finish_reason for one in llm.generate(PROMPT, stuck, use_tqdm=False)[0].outputs] == ["error"]


def test_log_probabilities_belong_to_the_beams_tokens(llm):
    output = llm.generate(PROMPT, beam_params(4, logprobs=2, prompt_logprobs=1), use_tqdm=False)[0]
    for one in output.outputs:
        assert len(one.logprobs) == len(one.token_ids)
        own = [entry[token] for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
        assert sum(logprob.logprob for logprob in own) == pytest.approx(one.cumulative_logprob)
        for entry in one.logprobs:
            assert {logprob.rank for logprob in entry.values()} >= {1, 2} and len(entry) <= 3
    assert any(logprob.rank > 1 for one in output.outputs for entry in one.logprobs for logprob in entry.values())
    assert len(output.prompt_logprobs) == len(PROMPT)
    metrics = output.metrics
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times)


def test_a_stream_shows_the_beams_so_far(llm):
    seen = [tokens_of(output) for output in llm.stream(PROMPT, beam_params(3, n=2))]
    assert [len(tokens[0]) for tokens in seen] == [*range(1, 9), 9]
    assert seen[-1] == tokens_of(llm.generate(PROMPT, beam_params(3, n=2), use_tqdm=False)[0])


def test_leaving_a_stream_frees_the_beams(llm):
    for _ in llm.stream(PROMPT, beam_params(3, max_tokens=50)):
        break
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests() and not engine.scheduler.has_unfinished and not engine._of_request
    assert engine.scheduler.memory.pool.num_free == engine.runner.num_pages and engine._num_watched == 0


def test_a_failed_step_ends_the_search(monkeypatch):
    llm = make_sum_llm(enforce_eager=True)
    submit, calls = llm.llm_engine.runner.submit, []

    def fails_once(plan):
        calls.append(plan)
        if len(calls) == 4:
            raise RuntimeError("the device caught fire")
        return submit(plan)

    monkeypatch.setattr(llm.llm_engine.runner, "submit", fails_once)
    output = llm.generate(PROMPT, beam_params(3), use_tqdm=False)[0]
    assert [one.finish_reason for one in output.outputs] == ["error"] * 3
    assert llm.generate(PROMPT, beam_params(3), use_tqdm=False)[0].outputs[0].token_ids == continuation(PROMPT, 9)


def test_max_model_len_ends_beams():
    llm = make_sum_llm(max_model_len=26, enforce_eager=True)
    output = llm.generate(PROMPT, beam_params(2, max_tokens=None), use_tqdm=False)[0]
    assert [(len(one.token_ids), one.finish_reason) for one in output.outputs] == [(4, "length")] * 2


def test_beam_search_method(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    outputs = llm.beam_search([PROMPT, {"prompt_token_ids": [1, 2]}, [5]], params)
    limited = llm.beam_search([PROMPT, [1, 2], [5]], params, concurrency_limit=2)
    assert outputs == limited and len(outputs) == 3
    for prompt, output in zip([PROMPT, [1, 2], [5]], outputs, strict=True):
        assert len(output.sequences) == 3 and output.sequences[0].tokens == prompt + continuation(prompt, 6)
        assert all(len(one.logprobs) == 6 and len(one.logprobs[0]) == 6 for one in output.sequences)
        totals = [one.cum_logprob for one in output.sequences]
        assert totals == sorted(totals, reverse=True) and output.sequences[0].text is None
    greedy = llm.beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=6))[0].sequences
    assert [one.tokens for one in greedy] == [PROMPT + continuation(PROMPT, 6)]
    flat = llm.beam_search([PROMPT], BeamSearchParams(beam_width=3, max_tokens=6, temperature=2.0))[0].sequences
    assert flat[0].cum_logprob < outputs[0].sequences[0].cum_logprob - 0.1
    assert llm.beam_search([], params) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(beam_width=0), "beam_width must be an integer of at least 1, got 0"),
        (dict(max_tokens=0), "max_tokens must be an integer of at least 1, got 0"),
        (dict(temperature=3.0), "temperature must be in"),
        (dict(length_penalty=math.inf), "length_penalty must be a number from -50 to 50"),
        (dict(watermarking={}), "watermarking must be None"),
    ],
)
def test_bad_params(fields, message):
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**dict(beam_width=2, max_tokens=3) | fields)


def test_what_the_engine_refuses(llm):
    with pytest.raises(ValueError, match="with 11 beams needs the 22 likeliest tokens of each, which exceeds"):
        llm.generate(PROMPT, beam_params(11))
    with pytest.raises(ValueError, match="output_kind must not be DELTA with use_beam_search"):
        beam_params(2, output_kind=RequestOutputKind.DELTA)
    with pytest.raises(ValueError, match="lora_request must be None"):
        llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=3), "adapter")
    with pytest.raises(ValueError, match="concurrency_limit must be None or at least 1, got 0"):
        llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=3), concurrency_limit=0)


# --- with text


def test_stop_strings_end_beams(default_llm):
    free = default_llm.generate("Once upon a time", beam_params(4, max_tokens=16), use_tqdm=False)[0]
    words = free.outputs[0].text.split()
    assert len(words) > 4
    stop = words[3]
    output = default_llm.generate("Once upon a time", beam_params(4, max_tokens=16, stop=stop), use_tqdm=False)[0]
    stopped = [one for one in output.outputs if one.stop_reason == stop]
    assert stopped and all(stop not in one.text and one.finish_reason == "stop" for one in stopped)
    tokenizer = default_llm.get_tokenizer()
    for one in output.outputs:
        assert stop not in one.text
        assert (tokenizer.decode(one.token_ids).split(stop)[0]).strip() == one.text.strip()


def test_text_of_the_method(default_llm):
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    for one in default_llm.beam_search(["Once upon a time"], params)[0].sequences:
        assert one.text == default_llm.get_tokenizer().decode(one.tokens, skip_special_tokens=True)
        assert one.text.startswith("Once upon a time")


def test_a_streams_text_grows_with_its_beam(default_llm):
    for output in default_llm.stream("Once upon a time", beam_params(3, max_tokens=10, detokenize=True)):
        for one in output.outputs:
            whole = default_llm.get_tokenizer().decode(one.token_ids)
            assert whole.strip().startswith(one.text.strip())
