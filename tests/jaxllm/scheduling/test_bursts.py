"""Several decode steps in one plan: a stop token among them is the end, for the request and for the prefix cache."""

import pytest

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
