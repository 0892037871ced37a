"""Loops of decode steps: the tokens of single steps, whatever is sampled; nothing is computed after a stop token."""

import numpy as np
import pytest

import jaxllm
from jaxllm import SamplingParams
from jaxllm.models.testing import continuation
from jaxllm.runner import model_runner
from jaxllm.runner.sampler import MAX_STOP_IDS, Level
from jaxllm.scheduling import loop
from tests.jaxllm.conftest import make_sum_llm

STEPS, PAGE = 4, 8
PROMPT = [5, 9, 2]


@pytest.fixture
def with_loops(monkeypatch):
    """Lets engines that are made from here on plan as many steps as they may, and run them in loops of STEPS."""
    monkeypatch.setitem(model_runner.LOOP_STEPS, "cpu", STEPS)
    monkeypatch.setattr(loop, "BURST_SECONDS", 100.0)


class Recording:
    """Executables that note which of them are asked for."""

    def __init__(self, llm, monkeypatch):
        self.programs, self.used = llm.llm_engine.runner.executables, []
        monkeypatch.setattr(llm.llm_engine.runner, "executables", self)

    def __getitem__(self, key):
        self.used.append(key)
        return self.programs[key]

    @property
    def steps(self):
        """Of each program for decode steps alone, in order."""
        return [key.num_steps for key in self.used if getattr(key, "decode_only", False)]

    @property
    def loop_levels(self):
        return {key.level for key in self.used if getattr(key, "num_steps", 1) > 1}


def mixed_params() -> list[SamplingParams]:
    fields = [
        dict(temperature=0.0, max_tokens=21),
        dict(temperature=0.9, seed=1, n=2, max_tokens=17),
        dict(temperature=1.3, seed=2, top_k=20, max_tokens=9, ignore_eos=True),
        dict(temperature=0.8, seed=3, top_p=0.8, max_tokens=30),
        dict(temperature=1.5, seed=4, min_p=0.1, max_tokens=26, ignore_eos=True),
        dict(temperature=1.0, seed=5, top_k=9, top_p=0.9, min_p=0.02, max_tokens=13),
        dict(temperature=1.0, seed=6, max_tokens=1),
    ]
    return [SamplingParams(**one) for one in fields]


def texts(llm, params) -> list[list[tuple]]:
    outputs = llm.generate(["Once upon a time"] * len(params), params, use_tqdm=False)
    return [[(one.text, one.token_ids, one.finish_reason) for one in output.outputs] for output in outputs]


def test_sampled_tokens_are_those_of_single_steps(default_llm, with_loops, monkeypatch):
    params = mixed_params()
    drawn = [SamplingParams(temperature=1.2, seed=seed, max_tokens=18) for seed in range(6)]
    expected = [texts(default_llm, params), texts(default_llm, drawn)]
    llm = jaxllm.LLM(max_model_len=512, max_num_seqs=16, max_num_batched_tokens=128, use_tqdm_on_load=False)
    recording = Recording(llm, monkeypatch)
    assert [texts(llm, params), texts(llm, drawn)] == expected
    assert Level.FILTER in recording.loop_levels
    assert len(recording.programs) == len(llm.llm_engine.runner.program_keys)  # nothing was compiled late


@pytest.mark.parametrize("ahead", [True, False])
def test_rows_end_within_a_loop_and_others_are_sampled_in_between(ahead, with_loops, monkeypatch):
    llm = make_sum_llm(block_size=PAGE, async_scheduling=ahead)
    recording = Recording(llm, monkeypatch)
    prompts = [[(i * k + 1) % 32 for i in range(length)] for k, length in enumerate([1, 3, 15, 16, 17, 40, 90, 33], 1)]
    lengths = [1, 5, 9, 12, 13, 30, 31, 40]

    def tokens(prompts, params):
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    greedy = [SamplingParams(temperature=0, max_tokens=length) for length in lengths]
    assert tokens(prompts, greedy) == [continuation(*both) for both in zip(prompts, lengths, strict=True)]
    assert STEPS in recording.steps
    expected = continuation(prompts[4], 12)
    stopped = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[expected[5]])
    assert tokens(prompts[4], stopped) == [expected[: expected.index(expected[5]) + 1]]
    drawn = SamplingParams(temperature=1.0, top_k=1, max_tokens=9)
    assert tokens(prompts[5:7], [drawn, greedy[2]]) == [continuation(prompt, 9) for prompt in prompts[5:7]]


def written_positions(llm) -> list[int]:
    """How many tokens' values lie in each page that is not empty. The sum model writes its tokens; none here is 0."""
    values = np.asarray(llm.llm_engine.runner._kv[0].v)[:, 0, :, 0]
    return sorted(int(count) for count in np.count_nonzero(values, axis=1) if count)


def generate(llm, **fields):
    """The one answer to PROMPT, and the tokens whose KV was written for it."""
    llm.llm_engine.runner.reset()
    llm.llm_engine.reset_prefix_cache()
    output = llm.generate(PROMPT, SamplingParams(temperature=0, **fields), use_tqdm=False)[0].outputs[0]
    llm.llm_engine.drain()
    llm.llm_engine.scheduler.check()
    return output, sum(written_positions(llm))


def first_stop() -> tuple[int, list[int]]:
    """A place in the answer to PROMPT that is the first of its token, in the middle of a loop; and the answer."""
    tokens = continuation(PROMPT, 60)
    assert 0 not in tokens[:20]
    return next(i for i in range(6, 20) if tokens.index(tokens[i]) == i and i % STEPS == 2), tokens


@pytest.mark.parametrize("ahead", [True, False])
def test_nothing_is_written_after_a_stop_token(ahead, with_loops):
    llm = make_sum_llm(block_size=PAGE, async_scheduling=ahead)
    place, tokens = first_stop()
    output, written = generate(llm, max_tokens=60, stop_token_ids=[tokens[place]])
    assert output.token_ids == tokens[: place + 1] and output.finish_reason == "stop"
    assert written == len(PROMPT) + place  # not even the stop token itself
    output, _ = generate(llm, max_tokens=place + 3)
    assert output.token_ids == tokens[: place + 3] and output.finish_reason == "length"


def test_more_stop_tokens_than_a_row_brings_are_left_to_the_host(with_loops):
    llm = make_sum_llm(block_size=PAGE)
    place, tokens = first_stop()
    stop = tokens[place]
    unseen = [token for token in range(32) if token not in tokens[: place + 1]]
    smaller = [token for token in unseen if token < stop]
    assert len(smaller) >= MAX_STOP_IDS
    output, written = generate(llm, max_tokens=60, stop_token_ids=[*smaller, stop])
    assert output.token_ids == tokens[: place + 1] and output.stop_reason == stop
    assert written > len(PROMPT) + place


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_an_end_of_sequence_ends_a_loop_unless_ignored(ignore_eos, with_loops):
    llm = make_sum_llm(block_size=PAGE)
    place, tokens = first_stop()
    llm.llm_engine.eos_token_ids = (tokens[place],)
    output, written = generate(llm, max_tokens=60, ignore_eos=ignore_eos)
    assert output.token_ids == (tokens if ignore_eos else tokens[: place + 1])
    assert (written == len(PROMPT) + place) is not ignore_eos


def test_a_prompt_that_ends_with_its_stop_token_is_answered(with_loops):
    llm = make_sum_llm(block_size=1, max_model_len=64)  # the second time only the prompt's last token is computed
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[PROMPT[-1]])
    tokens = continuation(PROMPT, 12)
    expected = tokens[: tokens.index(PROMPT[-1]) + 1] if PROMPT[-1] in tokens else tokens
    for _ in range(2):
        assert llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("num_tokens", "steps"), [(9, [4, 4]), (8, [4, 4]), (7, [4, 4]), (6, [4, 1]), (5, [4]), (2, [1])]
)
def test_half_a_loop_is_left_to_a_loop(num_tokens, steps, with_loops, monkeypatch):
    """The first token is the prompt's step's. Of a loop's steps that are too many none writes anything."""
    llm = make_sum_llm(block_size=PAGE, num_scheduler_steps=100, async_scheduling=False)
    generate(llm, max_tokens=3)  # a first step tells how long one takes
    recording = Recording(llm, monkeypatch)
    output, written = generate(llm, max_tokens=num_tokens, ignore_eos=True)
    assert output.token_ids == continuation(PROMPT, num_tokens)
    assert recording.steps == steps
    assert written == len(PROMPT) + num_tokens - 1
