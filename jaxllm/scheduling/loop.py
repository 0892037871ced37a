"""EngineLoop: schedule, submit, take in. The same loop drives a device and a simulation; only the executor differs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from jaxllm.scheduling.plan import StepOutput, StepPlan
from jaxllm.scheduling.request import IntArray
from jaxllm.scheduling.scheduler import Scheduler

BURST_SECONDS = 0.008  # so long a row's tokens may be held back, and a newcomer kept waiting, for the sake of few plans
LOOP_SECONDS = 0.016  # the same for the sake of one device loop, without which the device may wait for the host


class StepResult(Protocol):
    @property
    def tokens(self) -> IntArray: ...  # i32[S] or i32[num_steps, S]: the sampled tokens of the plan's rows


ResultT_co = TypeVar("ResultT_co", bound=StepResult, covariant=True)


class Pending(Protocol[ResultT_co]):
    """A step that has been handed to the device."""

    def result(self) -> ResultT_co: ...  # waits for it


class Executor(Protocol[ResultT_co]):
    def submit(self, plan: StepPlan) -> Pending[ResultT_co]: ...  # returns at once


class EngineLoop(Generic[ResultT_co]):
    """Runs steps, `ahead` of their results by 0 or 1, up to `max_steps` a plan; the executor has loops of `loop_steps`.

    Run plainly, the device waits while Python schedules and Python waits while the device computes. Run ahead by one,
    step k+1 is scheduled and submitted before the tokens of step k are read:

        host    schedule 1 | schedule 2 | read 1, schedule 3 | read 2, schedule 4 | ...
        device             |   step 1   |       step 2       |       step 3       | ...
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor[ResultT_co],
        clock: Callable[[], float],
        ahead: int = 1,
        max_steps: int = 1,
        loop_steps: int = 1,
    ) -> None:
        self.scheduler, self.executor, self.clock = scheduler, executor, clock
        self.ahead, self.max_steps, self.loop_steps = ahead, max_steps, loop_steps
        self._in_flight: deque[tuple[StepPlan, Pending[ResultT_co], float]] = deque()
        self._seconds_per_step = float("inf")
        self._last_result_at = float("-inf")

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self.scheduler.has_unfinished

    def step(self) -> tuple[StepOutput, ResultT_co] | None:
        """Submits the next plan, and takes in the oldest result that is due; None if none was."""
        plan = self.scheduler.schedule(self.clock(), self._steps_in_a_burst())
        if plan:
            self._in_flight.append((plan, self.executor.submit(plan), self.clock()))
        if not self._in_flight or (plan and len(self._in_flight) <= self.ahead):
            return None
        plan, pending, since = self._in_flight.popleft()
        result = pending.result()
        now = self.clock()
        seconds = now - max(since, self._last_result_at)
        self._last_result_at = now
        if plan.num_decodes == len(plan.slots):
            self._seconds_per_step = seconds / plan.num_steps
        return self.scheduler.update(plan, result.tokens, now, seconds), result

    def _steps_in_a_burst(self) -> int:
        """Where a decode step is shorter than the host's work for it, several are planned at once: whole loops."""
        steps = min(int(BURST_SECONDS / max(self._seconds_per_step, 1e-9)), self.max_steps)
        if steps >= self.loop_steps:
            return steps - steps % self.loop_steps
        fits = self.loop_steps <= self.max_steps and self.loop_steps * self._seconds_per_step <= LOOP_SECONDS
        return self.loop_steps if fits else max(steps, 1)

    def drop_in_flight(self) -> None:
        """Forgets the steps in flight, after the executor has failed."""
        self._in_flight.clear()
