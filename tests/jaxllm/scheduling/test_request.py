"""Request: its numbers while waiting, resident and finished, and the tokens of any part of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.scheduling.request import FinishReason, Request, State
from jaxllm.scheduling.scheduler import Scheduler, SchedulerConfig


def request(prompt, output=(), **fields) -> Request:
    return Request("a", np.array(prompt, np.int32), 10, output_token_ids=list(output), **fields)


def test_a_waiting_request_has_everything_to_compute():
    one = request([1, 2, 3], [4, 5])
    assert (one.state, one.prompt_len, one.generated, one.num_tokens) == (State.WAITING, 3, 2, 5)
    assert (one.computed, one.remaining, one.num_pages) == (0, 5, 0)


def test_numbers_along_its_life():
    scheduler = Scheduler(SchedulerConfig(8, 2, 2, 4, 16))
    one = Request("a", np.arange(1, 7, dtype=np.int32), 2)
    scheduler.add(one, 1.0)
    seen = []
    for now in (2.0, 3.0, 4.0):
        plan = scheduler.schedule(now)
        seen.append((one.state, one.computed, one.remaining, one.num_pages))
        scheduler.update(plan, np.array([9], np.int32), now + 0.5)
    # Two chunks of the prompt, then a decode step. A token in flight is to be computed next.
    assert seen == [(State.RESIDENT, 4, 2, 2), (State.RESIDENT, 6, 1, 3), (State.RESIDENT, 7, 1, 4)]
    assert one.output_token_ids == [9, 9]
    assert (one.state, one.finish_reason, one.slot, one.num_pages) == (State.FINISHED, FinishReason.LENGTH, -1, 0)
    assert (one.first_scheduled_at, one.first_token_at) == (2.0, 3.5)


def test_a_fork_is_computed_from_the_pages_of_its_parent():
    scheduler = Scheduler(SchedulerConfig(8, 2, 2, 8, 16))
    one = Request("a", np.arange(1, 7, dtype=np.int32), 1)
    scheduler.add(one, 1.0)
    scheduler.update(scheduler.schedule(2.0), np.array([9], np.int32), 2.5)
    forks = [one.fork(f"a{token}", [token], 2) for token in (7, 8)]
    for fork in forks:
        scheduler.add(fork, 3.0)
    plan = scheduler.schedule(3.5)
    assert plan.starts.tolist() == [6, 6] and plan.tokens.tolist() == [7, 8]
    assert scheduler.residents.pages[[fork.slot for fork in forks], :3].tolist() == [[0, 1, 2]] * 2
    scheduler.check()
    assert (one.output_token_ids, one.finish_reason) == ([9], FinishReason.LENGTH)
    assert [fork.first_scheduled_at for fork in forks] == [2.0] * 2 and scheduler.memory.queried_tokens == 6


def test_finish_reasons_are_vllm_s():
    assert [reason.value for reason in FinishReason] == ["stop", "length", "abort", "error", "repetition"]


TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=12)


@given(TOKENS, TOKENS, st.integers(0, 30), st.integers(0, 30))
def test_tokens_are_a_slice_of_prompt_and_output(prompt, output, start, stop):
    one = request(prompt, output)
    start, stop = sorted((min(start, one.num_tokens), min(stop, one.num_tokens)))
    found = one.tokens(start, stop)
    assert found.dtype == np.int32 and found.tolist() == (prompt + output)[start:stop]


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_pages_of_tokens_grow_with_the_output(prompt, output, page_size):
    one = request(prompt)
    for token in [None, *output]:
        one.output_token_ids += [] if token is None else [token]
        count = one.num_tokens // page_size
        pages = list(one.pages_of_tokens(count, page_size))
        expected = np.array((prompt + one.output_token_ids)[: count * page_size], np.int32)
        assert pages == [part.tobytes() for part in expected.reshape(count, page_size)]
        assert list(one.pages_of_tokens(count // 2, page_size)) == pages[: count // 2]


def test_requests_are_compared_by_identity():
    assert request([1]) != request([1])
    with pytest.raises(AttributeError):
        request([1]).computd = 1  # a misspelt field is no new one
