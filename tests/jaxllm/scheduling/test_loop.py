"""EngineLoop: in which order it schedules, submits and reads, plainly and ahead by one."""

from dataclasses import dataclass

import numpy as np
import pytest

from jaxllm.scheduling.loop import EngineLoop
from jaxllm.scheduling.request import FinishReason, Request
from jaxllm.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.jaxllm.scheduling.token_device import TokenDevice, expected_output


@dataclass
class Result:
    tokens: np.ndarray


class RecordingExecutor:
    """Runs plans on a TokenDevice when they are submitted, and writes down what it is asked for."""

    def __init__(self, config):
        self.device, self.log = TokenDevice(config), []

    def submit(self, plan):
        self.log.append(f"submit {plan.step}")
        tokens, log = self.device.execute(plan), self.log

        class Pending:
            def result(self):
                log.append(f"read {plan.step}")
                return Result(tokens)

        return Pending()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def make(ahead, requests, **fields):
    scheduler = Scheduler(SchedulerConfig(**(dict(
        num_pages=16, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64) | fields)))  # fmt: skip
    for name, prompt, new in requests:
        scheduler.add(Request(name, np.array(prompt, np.int32), new))
    executor = RecordingExecutor(scheduler.config)
    return EngineLoop(scheduler, executor, Clock(), ahead), executor


def run(loop):
    outputs = []
    while not loop.idle:
        taken = loop.step()
        loop.scheduler.check()
        outputs.append(None if taken is None else [one.id for one in taken[0].requests])
        assert len(outputs) < 100
    return outputs


def test_plainly_each_step_is_read_before_the_next_is_made():
    loop, executor = make(0, [("a", [1, 2, 3], 3)])
    assert run(loop) == [["a"], ["a"], ["a"]]
    assert executor.log == ["submit 1", "read 1", "submit 2", "read 2", "submit 3", "read 3"]


def test_ahead_the_next_step_is_submitted_before_one_is_read():
    loop, executor = make(1, [("a", [1, 2, 3], 3)])
    assert run(loop) == [None, ["a"], ["a"], ["a"]]
    assert executor.log == ["submit 1", "submit 2", "read 1", "submit 3", "read 2", "read 3"]


@pytest.mark.parametrize("ahead", [0, 1])
def test_both_orders_give_the_same_tokens(ahead):
    prompts = {"a": [1, 2, 3], "b": list(range(30)), "c": [5] * 9}
    loop, _ = make(ahead, [(name, prompt, 12) for name, prompt in prompts.items()], num_pages=12)
    requests = dict(loop.scheduler.requests)
    run(loop)
    for name, prompt in prompts.items():
        assert requests[name].output_token_ids == expected_output(prompt, 12)


def test_never_more_than_one_step_ahead():
    loop, executor = make(1, [(name, [1, 2], 9) for name in "abc"])
    run(loop)
    ahead = 0
    for event in executor.log:
        ahead += 1 if event.startswith("submit") else -1
        assert 0 <= ahead <= 2
    assert ahead == 0


def test_idle_with_nothing_to_do():
    loop, executor = make(1, [])
    assert loop.idle and loop.step() is None and executor.log == []


def test_a_step_in_flight_is_read_though_its_request_has_gone():
    loop, executor = make(1, [("a", [1, 2, 3], 9)])
    loop.step()
    loop.scheduler.abort("a")
    assert not loop.idle
    output, _ = loop.step()
    assert output.requests == [] and loop.idle and executor.log == ["submit 1", "read 1"]


def test_the_clock_gives_a_step_s_times():
    loop, _ = make(0, [("a", [1, 2, 3], 1)])
    seconds = []
    update = loop.scheduler.update
    loop.scheduler.update = lambda plan, tokens, now, took: (
        seconds.append((now, took)) or update(plan, tokens, now, took)
    )
    request = loop.scheduler.requests["a"]
    loop.step()
    # The clock is read before scheduling, after submitting and after reading.
    assert seconds == [(3.0, 1.0)] and (request.first_scheduled_at, request.first_token_at) == (1.0, 3.0)


def test_dropping_what_is_in_flight():
    loop, executor = make(1, [("a", [1, 2, 3], 9)])
    request = loop.scheduler.requests["a"]
    loop.step()
    loop.drop_in_flight()
    loop.scheduler.finish(request, FinishReason.ERROR)
    assert loop.idle and loop.step() is None and executor.log == ["submit 1"]


@pytest.mark.parametrize(
    ("seconds", "loop_steps", "expected"),
    [
        (float("inf"), 1, 1), (0.0001, 1, 16), (0.001, 1, 8), (0.0079, 1, 1), (0.05, 1, 1),
        (float("inf"), 8, 1), (0.0001, 8, 16), (0.0007, 8, 8), (0.0019, 8, 8), (0.0021, 8, 3),
        (0.0024, 4, 4), (0.0039, 4, 4), (0.0041, 4, 1), (0.012, 4, 1), (0.0001, 32, 16),
    ],
)  # fmt: skip
def test_a_burst_is_whole_loops_if_it_can_be(seconds, loop_steps, expected):
    loop, _ = make(1, [])
    loop.max_steps, loop.loop_steps, loop._seconds_per_step = 16, loop_steps, seconds
    assert loop._steps_in_a_burst() == expected
