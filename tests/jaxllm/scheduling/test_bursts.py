"""Several decode steps in one plan: a stop token among them is the end, for the request and for the prefix cache."""

import numpy as np
import pytest

from jaxllm.scheduling.plan import IN_FLIGHT
from jaxllm.scheduling.scheduler import Scheduler
from tests.jaxllm.scheduling.test_scheduler import Run, config, request
from tests.jaxllm.scheduling.token_device import expected_output


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_comes_after_a_stop_token_is_not_offered_to_the_prefix_cache(ahead):
    expected = expected_output([1, 1], 12)  # 2, 4, 8, 5, 10, ...
    scheduler = Scheduler(config(page_size=1, num_pages=40))
    one = request("a", [1, 1], 12, stop_token_ids=frozenset(expected[3:4]))
    scheduler.add(one)
    run = Run(scheduler, ahead, max_steps=8)
    run.all()
    assert any("+8" in plan for plan in run.plans)
    assert one.output_token_ids == expected[:4]
    longer = request("b", [1, 1, *expected[:10]], 2)
    scheduler.add(longer)
    run.all()
    assert longer.num_cached_tokens <= 6 and longer.output_token_ids == expected[10:12]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_a_stop_tokens_own_kv_is_not_offered_to_the_prefix_cache(ahead, page_size):
    """A loop ends with it, so that its page has a gap, although the plan was to go on."""
    expected = expected_output([1, 1], 12)
    for length in range(1, 7):
        scheduler = Scheduler(config(page_size=page_size, num_pages=40))
        scheduler.add(request("a", [1, 1], 12, stop_token_ids=frozenset(expected[length - 1 : length])))
        run = Run(scheduler, ahead, max_steps=8)
        run.all()
        longer = request("b", [1, 1, *expected[:10]], 2)
        scheduler.add(longer)
        run.all()
        assert longer.output_token_ids == expected[10:12]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_finished_rows_pages_are_the_next_owners_alone(ahead):
    """Plans that still name the ended row were made, and are run, before any that gives its pages to another."""
    expected = expected_output([1, 1], 12)
    scheduler = Scheduler(config(page_size=1, num_pages=14, enable_prefix_caching=False))
    run, others = Run(scheduler, ahead, max_steps=8), []
    scheduler.add(request("a", [1, 1], 12, stop_token_ids=frozenset(expected[3:4])))
    while scheduler.has_unfinished or run.in_flight:
        if run.step() and "a" not in scheduler.requests and len(others) < 3:
            others.append(request(f"b{len(others)}", [3, len(others)], 9))
            scheduler.add(others[-1])
    assert [one.output_token_ids for one in others] == [expected_output([3, i], 9) for i in range(3)]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("mates", [0, 2])
def test_a_stepwise_request_has_no_token_in_flight_when_the_next_is_planned(ahead, mates):
    scheduler = Scheduler(config(page_size=2, num_pages=12))  # few pages: they preempt one another
    stepwise = request("a", [1, 2, 3], 12, stepwise=True)
    others = [request(f"b{i}", [4, i], 12) for i in range(mates)]
    for one in (stepwise, *others):
        scheduler.add(one)
    run = Run(scheduler, ahead, max_steps=4)
    while scheduler.has_unfinished or run.in_flight:
        plan = run.step()
        if stepwise in plan.requests:
            row = plan.requests.index(stepwise)
            assert plan.num_steps == 1
            assert row >= plan.num_decodes or plan.tokens[row] != IN_FLIGHT
            assert int(np.sum(plan.starts[row] + plan.num_tokens[row])) <= stepwise.num_tokens
    for one in (stepwise, *others):
        assert one.output_token_ids == expected_output(one.prompt.tolist(), 12)
