"""Scheduler: which requests compute how many tokens in the next step. Pure Python and NumPy: no device, no clock.

There are no phases. Every request has tokens to catch up with: a new prompt many, a decoding one a single token, so
chunked prefill, prefix-cache hits, recomputation after preemption and decoding are all the same number in a plan.

A step: residents first, each as far as the token budget goes; where pages run out, victims give theirs up and will be
computed again (preemption by recompute). Then, if nobody was preempted, waiting requests are admitted while budget,
slots and pages last. A policy decides order, budget and victims. Whatever it decides, the scheduler guarantees:

  I1  no request is lost: each is waiting, resident or finished, and finishes once;
  I2  pages are free or held, never over-committed;
  I3  a row's pages cover what it computes, and it computes at least one token;
  I4  a plan stays within max_num_batched_tokens and max_num_seqs;
  I5  progress: if a policy's step would do nothing, first-come-first-served plans it; what can never fit is refused;
  I6  no livelock: a request preempted MAX_PREEMPTIONS times without a new token in between is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from jaxllm.scheduling.draft import Draft
from jaxllm.scheduling.kv_memory import KVMemory
from jaxllm.scheduling.plan import StepOutput, StepPlan
from jaxllm.scheduling.policy import Budget, EngineInfo, Policy, StepReport
from jaxllm.scheduling.request import FinishReason, IntArray, Request, State
from jaxllm.scheduling.residents import Ints, Residents
from jaxllm.scheduling.view import SchedulerView
from jaxllm.scheduling.waiting import WaitingQueue

MAX_PREEMPTIONS = 8

BoolArray = npt.NDArray[np.bool_]

logger = logging.getLogger(__name__)


class RequestTooLong(ValueError):
    """A request that could never be computed with this engine's memory or lengths."""


class _PolicyFailed(Exception):
    """A policy raised; the step goes on without it."""


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's share of the engine's configuration; see EngineConfig for the fields' meaning."""

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"without chunked prefill, max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_model_len ({self.max_model_len})"
            )
        if not self.enable_chunked_prefill and self.long_prefill_token_threshold:
            raise ValueError(
                f"long_prefill_token_threshold={self.long_prefill_token_threshold} cuts prompts into chunks: without "
                f"chunked prefill it must be 0"
            )


class Scheduler:
    """Continuous batching over a paged KV pool (Orca, OSDI 2022; vLLM, SOSP 2023; Sarathi-Serve, OSDI 2024).

    Use: `add` requests; then `plan = schedule(now)`, run it, `update(plan, tokens, now)`, and again. One more plan may
    be made before a step's tokens are known; those tokens are then in flight, and the plan refers to them without
    their values.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        self.config = config
        self.policy = policy or Policy()
        if self.policy.traits.preempt_to_admit and self.policy.traits.order != "all":
            raise ValueError('Traits.preempt_to_admit needs order="all": only then are the residents ranked')
        max_pages = -(-config.max_model_len // config.page_size)
        self.residents = Residents(config.max_num_seqs, max_pages)
        self.memory = KVMemory(config.num_pages, config.page_size, config.enable_prefix_caching, self.residents)
        self.waiting = WaitingQueue()
        self.requests: dict[str, Request] = {}
        self.num_preemptions = self.num_policy_stalls = self.num_policy_errors = self.num_recomputed_tokens = 0
        self._added = self.num_plans = 0
        self._fcfs = Policy()
        self._info = EngineInfo(
            config.page_size, config.num_pages, config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len
        )

    # --- requests come and go

    def add(self, request: Request, now: float = 0.0) -> None:
        """Queues a request. Raises RequestTooLong if it could never fit, ValueError if its id is in use."""
        if request.id in self.requests:
            raise ValueError(f"request id {request.id!r} is already in use")
        self.check_fits(request.prompt_len, request.max_new_tokens)
        request.index = self._added
        request.rank = self.policy.key(request)  # a policy's own code, which may raise: before anything is changed
        self.waiting.add(request)
        self._added += 1
        self.requests[request.id] = request
        self._tell("on_arrival", request, now)

    def abort(self, request_id: str, now: float = 0.0) -> Request | None:
        """Ends a request, in whatever state; None if there is none of this id. Tokens in flight are dropped."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT, None, now)
        return request

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; residents keep their pages, but nobody else will find them."""
        if self.memory.cache is not None:
            self.memory.cache.clear()

    def check(self) -> None:
        """Asserts the invariants I1-I3 between steps."""
        states = [request.state for request in self.requests.values()]
        assert states.count(State.WAITING) == len(self.waiting)
        assert states.count(State.RESIDENT) == len(self.residents) == len(states) - len(self.waiting)
        self.memory.check()

    # --- planning

    def schedule(self, now: float, max_steps: int = 1) -> StepPlan:
        """The next step's plan; an empty one if there is nothing to do before results of steps in flight are known.

        If nobody waits and all residents decode, the plan may be for up to `max_steps` steps in a row.
        """
        self.num_plans += 1
        view = SchedulerView(now, self.num_plans, self._info, self.waiting, self.residents, self.memory)
        draft = self._draft(self.policy, view)
        draft.num_steps = max_steps
        try:
            self._fill(draft, self.policy, view)
        except _PolicyFailed as failure:
            self._report_policy_error(failure)
            self._fill(draft, self._fcfs, view)
        if draft.empty and self.requests and not self.residents.pending.any():
            self.num_policy_stalls += 1
            draft = replace(self._draft(self._fcfs, view), preempted=draft.preempted, ignore_protection=True)
            draft.considered.update(request.id for request in draft.preempted)
            self._fill(draft, self._fcfs, view)
        if draft.at_once is None:
            draft.num_steps = 1
        return draft.finish(self.num_plans, self.residents)

    def _draft(self, policy: Policy, view: SchedulerView) -> Draft:
        budget = Budget(self.config.max_num_batched_tokens)
        if overrides(policy, "budget"):
            try:
                budget = policy.budget(view)
            except Exception as error:
                self._report_policy_error(error)
        return Draft.of(budget, self.config.max_num_batched_tokens, self.config.long_prefill_token_threshold)

    def _fill(self, draft: Draft, policy: Policy, view: SchedulerView) -> None:
        """Gives tokens to requests until something runs out."""
        if policy.traits.order == "waiting":
            if not draft.residents_done:
                self._run_residents(draft, policy, view)
            candidates = self._ordered(policy, view) if self._may_admit(draft, policy) else ()
        else:
            candidates = self._ordered(policy, view)
        for request in candidates:
            if request.id in draft.considered or self.requests.get(request.id) is not request:
                continue  # named twice, or not ours
            draft.considered.add(request.id)
            if request.state is State.RESIDENT:
                self._run(request, draft, policy, view)
                self.memory.publish(np.array([request.slot] if request.slot >= 0 else [], np.int64))
            elif not self._may_admit(draft, policy):
                continue
            elif not self._admit(request, draft, policy, view) and policy.traits.blocked_head == "stop":
                break

    # --- residents

    def _run_residents(self, draft: Draft, policy: Policy, view: SchedulerView) -> None:
        """All residents, in admission order."""
        draft.residents_done = True
        if not draft.considered and self._run_all_at_once(draft):
            return
        draft.may_unplan = not draft.num_tokens
        for request in self.residents.in_order():
            if request.state is State.RESIDENT and request.id not in draft.considered:
                draft.considered.add(request.id)
                self._run(request, draft, policy, view)
        draft.may_unplan = False
        self.memory.publish(np.array(list(draft.num_tokens), np.int64))

    def _run_all_at_once(self, draft: Draft) -> bool:
        """The usual case, in a few array operations: every page that the residents need is free. Else False."""
        r, slots = self.residents, self.residents.order
        remaining = self._remaining(slots)
        counts = draft.sizes(remaining)
        several = self._several_steps(draft.num_steps, remaining, counts)
        if several is not None and (pages := self._free_pages_for(slots, several)) is not None:
            counts, draft.num_steps = several, int(several.max())
        elif (pages := self._free_pages_for(slots, counts)) is not None:
            draft.num_steps = 1
        else:
            return False
        self.memory.grow(slots, pages)
        r.computed[slots] += counts
        runs = counts > 0
        draft.take_all(slots[runs], counts[runs], remaining[runs])
        self.memory.publish(slots[runs])
        return True

    def _several_steps(self, num_steps: int, remaining: Ints, counts: Ints) -> Ints | None:
        """Tokens for each resident if all decode for `num_steps` steps in a row; None if that cannot be."""
        r, slots = self.residents, self.residents.order
        decoding = remaining > 0
        if (
            num_steps == 1
            or len(self.waiting)
            or not decoding.any()
            or (remaining > 1).any()
            or (counts < remaining).any()
            or r.stepwise[slots].any()
        ):
            return None
        several: Ints = np.where(decoding, np.minimum(num_steps, r.limit[slots] - r.total[slots]), 0)
        return several

    def _free_pages_for(self, slots: Ints, counts: Ints) -> Ints | None:
        """Pages that each slot lacks to compute `counts` more tokens; None if fewer than all of them are free."""
        r = self.residents
        lacking: Ints = np.maximum(-(-(r.computed[slots] + counts) // self.config.page_size) - r.num_pages[slots], 0)
        return lacking if int(lacking.sum()) <= self.memory.pool.num_free else None

    def _remaining(self, slots: Ints) -> Ints:
        """Tokens that each slot has to catch up with; 0 once its last token, or one it must know, is in flight."""
        r = self.residents
        blocked = (r.total[slots] >= r.limit[slots]) | (r.stepwise[slots] & (r.pending[slots] > 0))
        return np.where(blocked, 0, r.total[slots] - r.computed[slots])

    def _run(self, request: Request, draft: Draft, policy: Policy, view: SchedulerView) -> None:
        """One resident, as far as the budget goes; preempts where pages run out."""
        r, slot = self.residents, request.slot
        remaining = int(self._remaining(np.array([slot]))[0])
        count = draft.size(remaining)
        if count <= 0:
            return
        pages = self.memory.pages_for(int(r.computed[slot]) + count) - int(r.num_pages[slot])
        if not self._make_room(pages, request, draft, policy, view):
            return
        self.memory.grow(np.array([slot]), np.array([max(pages, 0)]))
        r.computed[slot] += count
        draft.take(slot, count, remaining)

    def _make_room(self, pages: int, request: Request, draft: Draft, policy: Policy, view: SchedulerView) -> bool:
        """Preempts the policy's victims until `pages` are free; False if they don't come free for `request`."""
        pool = self.memory.pool
        if pages <= pool.num_free:
            return True
        for victim in self._victims(policy, pages - pool.num_free, view):
            if victim is not request and not self._may_preempt(victim, draft):
                continue
            self._preempt(victim, draft)
            if victim is request:
                return False
            if pages <= pool.num_free:
                return True
        return False

    def _may_preempt(self, victim: Request, draft: Draft) -> bool:
        if self.requests.get(victim.id) is not victim or victim.state is not State.RESIDENT:
            return False
        if victim.preemptions_in_a_row >= MAX_PREEMPTIONS and not draft.ignore_protection:
            return False
        planned = victim.slot in draft.num_tokens
        return draft.may_unplan if planned else draft.may_unplan or victim.id not in draft.considered

    def _preempt(self, victim: Request, draft: Draft) -> None:
        """Takes the victim's pages; it waits to be computed again. A token in flight will still reach it."""
        r, slot = self.residents, victim.slot
        computed = int(r.computed[slot])
        if slot in draft.num_tokens:
            count = draft.num_tokens[slot]
            computed -= count
            draft.give_back(slot, int(r.total[slot]) - computed)
        self.num_recomputed_tokens += computed
        self.memory.pool.release(r.remove(victim))
        victim.state = State.WAITING
        victim.preemptions += 1
        victim.preemptions_in_a_row += 1
        self.num_preemptions += 1
        self.waiting.add(victim)
        draft.preempted.append(victim)
        draft.considered.add(victim.id)

    # --- waiting requests

    def _may_admit(self, draft: Draft, policy: Policy) -> bool:
        return (
            draft.tokens_left > 0
            and self.residents.num_free > 0
            and len(self.waiting) > 0
            and (not draft.preempted or policy.traits.admit_after_preempt)
        )

    def _admit(self, request: Request, draft: Draft, policy: Policy, view: SchedulerView) -> bool:
        """Makes a waiting request resident and plans its first tokens; False if it does not fit now."""
        hits = self.memory.match(request)
        start = len(hits) * self.config.page_size
        remaining = request.num_tokens - start
        count = draft.size(remaining)
        if count <= 0 or (count < remaining and not self.config.enable_chunked_prefill):
            return False
        # All of its known tokens must fit, not only this chunk: else it would soon be the next victim.
        wanted = self.memory.pages_for(request.num_tokens) - len(hits) + self._reserve(policy, request, view)
        if not self._displace(wanted, hits, request, draft, policy, view):
            return False
        slot = self.residents.add(request, self._limit(request))
        self.waiting.remove(request)
        self.memory.begin(request, hits)
        if request.first_scheduled_at is None:
            request.first_scheduled_at = view.now
        self.memory.grow(np.array([slot]), np.array([self.memory.pages_for(start + count) - len(hits)]))
        self.residents.computed[slot] += count
        draft.take(slot, count, remaining)
        self.memory.publish(np.array([slot]))
        return True

    def _displace(
        self, pages: int, hits: list[int], request: Request, draft: Draft, policy: Policy, view: SchedulerView
    ) -> bool:
        """Whether `pages` are free besides the hits; a policy that may preempt to admit makes them so."""
        if pages <= self.memory.num_free_without(hits):
            return True
        if not policy.traits.preempt_to_admit:
            return False
        for victim in self._victims(policy, pages - self.memory.num_free_without(hits), view):
            if self._may_preempt(victim, draft):
                self._preempt(victim, draft)
                if pages <= self.memory.num_free_without(hits):
                    return True
        return False

    # --- results

    def update(self, plan: StepPlan, tokens: IntArray, now: float = 0.0, seconds: float = 0.0) -> StepOutput:
        """Takes in a plan's result: `tokens` i32[S] or i32[num_steps, S], read only where a row takes part and samples.

        A row whose request has ended meanwhile is ignored; one whose request was preempted meanwhile still counts: it
        was computed from that request's own tokens. Of several tokens those after a stop token are dropped.
        """
        r, tokens = self.residents, np.atleast_2d(tokens)
        here = r.generation[plan.slots] == plan.generations
        rows = np.flatnonzero(plan.samples & here)
        slots, new = plan.slots[rows], tokens[:, rows].T  # [rows, num_steps]
        before = r.total[slots] - r.pending[slots]
        planned = plan.num_tokens[rows] if plan.num_steps > 1 else np.ones(len(rows), np.int64)
        counts, stopped = self._stops(slots, new, before, planned)
        r.pending[slots] -= planned
        r.total[slots] -= planned - counts  # what came after a stop token is no token of the request
        r.last_token[slots] = new[np.arange(len(rows)), counts - 1]
        # Loops stop at a stop token: its own KV may never be written, whatever the plans made meanwhile count on.
        ended = slots[stopped]
        r.computed[ended] = np.minimum(r.computed[ended], (before + counts)[stopped] - 1)
        done = stopped | (before + counts >= r.limit[slots])
        requests = plan.requests if len(rows) == len(plan.requests) else [plan.requests[row] for row in rows.tolist()]
        values: list[list[int]] = new.tolist()
        if plan.num_steps > 1:
            values = [value[:count] for value, count in zip(values, counts.tolist(), strict=True)]
        for request, value in zip(requests, values, strict=True):
            request.output_token_ids += value
        for i in np.flatnonzero(before == r.prompt_len[slots]).tolist():
            requests[i].first_token_at = now
        finished = [requests[i] for i in np.flatnonzero(done).tolist()]
        if finished:
            self.memory.publish(slots[done])  # of those that go on, the next plan does it
        for request, stop in zip(finished, stopped[done].tolist(), strict=True):
            self._end(request, stop, now)
        self._forgive(requests)
        output = StepOutput(requests, values, rows, finished)
        if not here.all():
            output = self._with_late(output, plan, np.flatnonzero(plan.samples & ~here).tolist(), tokens, now)
        if overrides(self.policy, "on_step"):
            self._report_step(plan, output, now, seconds)
        return output

    def _stops(self, slots: Ints, new: IntArray, before: Ints, planned: Ints) -> tuple[Ints, BoolArray]:
        """How many of the new tokens [rows, num_steps] count, and whether the last of them is a stop token."""
        r, index = self.residents, np.arange(new.shape[1])
        if len(index) == 1:
            stopped = (new == r.stop_ids[slots]).any(axis=1) & (before + 1 >= r.min_total[slots])
            return planned, stopped
        stops = (new[:, :, None] == r.stop_ids[slots][:, None, :]).any(axis=2)
        stops &= (before[:, None] + index + 1 >= r.min_total[slots][:, None]) & (index < planned[:, None])
        stopped = stops.any(axis=1)
        return np.where(stopped, stops.argmax(axis=1) + 1, planned), stopped

    def _with_late(
        self, output: StepOutput, plan: StepPlan, rows: list[int], tokens: IntArray, now: float
    ) -> StepOutput:
        """Adds the tokens of requests that lost their slot after the plan was made, unless they have ended."""
        rows = [row for row in rows if plan.requests[row].state is State.WAITING]
        if not rows:
            return output
        requests = [plan.requests[row] for row in rows]
        taken = [self._take_late(plan, row, tokens[:, row].tolist(), now) for row in rows]
        return StepOutput(
            output.requests + requests,
            output.tokens + taken,
            np.concatenate([output.rows, np.array(rows, np.int64)]),
            output.finished + [request for request in requests if request.state is State.FINISHED],
        )

    def _take_late(self, plan: StepPlan, row: int, tokens: list[int], now: float) -> list[int]:
        request, taken = plan.requests[row], list[int]()
        request.preemptions_in_a_row = 0
        if request.first_token_at is None:
            request.first_token_at = now
        for token in tokens[: int(plan.num_tokens[row])] if plan.num_steps > 1 else tokens:
            request.output_token_ids.append(token)
            taken.append(token)
            stopped = token in request.stop_token_ids and request.generated >= request.min_new_tokens
            if stopped or request.num_tokens >= self._limit(request):
                self._end(request, stopped, now)
                break
        return taken

    def _forgive(self, requests: list[Request]) -> None:
        """A new token ends a row of preemptions (I6)."""
        if self.num_preemptions:
            for request in requests:
                request.preemptions_in_a_row = 0

    def _end(self, request: Request, stopped: bool, now: float) -> None:
        if stopped:
            self._finish(request, FinishReason.STOP, request.output_token_ids[-1], now)
        else:
            self._finish(request, FinishReason.LENGTH, None, now)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | None = None, now: float = 0.0) -> None:
        """Ends an unfinished request from outside, for example because its text met a stop string."""
        if self.requests.get(request.id) is request:
            self._finish(request, reason, stop_reason, now)

    def _finish(self, request: Request, reason: FinishReason, stop_reason: int | None, now: float) -> None:
        if request.state is State.RESIDENT:
            self.memory.pool.release(self.residents.remove(request))
        else:
            self.waiting.remove(request)
        del self.requests[request.id]
        request.state, request.finish_reason, request.stop_reason = State.FINISHED, reason, stop_reason
        self._tell("on_finish", request, now)

    # --- limits

    def _limit(self, request: Request) -> int:
        return min(request.prompt_len + request.max_new_tokens, self.config.max_model_len)

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """Raises RequestTooLong, with the numbers, for a request that could never be computed to its end."""
        config = self.config
        if prompt_len < 1:
            raise RequestTooLong("the prompt is empty: it needs at least one token")
        if prompt_len >= config.max_model_len:
            raise RequestTooLong(
                f"the prompt has {prompt_len} tokens; max_model_len is {config.max_model_len}, of which at "
                f"least one token is for the answer: shorten the prompt or raise max_model_len"
            )
        limit = min(prompt_len + max_new_tokens, config.max_model_len)
        pages = self.memory.pages_for(limit - 1)  # the last token's own KV is never needed
        if pages > config.num_pages:
            raise RequestTooLong(
                f"the request needs {pages} KV pages ({prompt_len} prompt tokens and up to {limit - prompt_len} new "
                f"ones, {config.page_size} tokens a page); the pool has {config.num_pages}: lower max_tokens, or give "
                f"the KV cache more memory"
            )

    # --- talking to the policy; whatever it raises stays here

    def _reserve(self, policy: Policy, request: Request, view: SchedulerView) -> int:
        if not overrides(policy, "reserve"):
            return 0
        try:
            return max(int(policy.reserve(request, view)), 0)
        except Exception as error:
            raise _PolicyFailed from error

    def _ordered(self, policy: Policy, view: SchedulerView) -> Iterator[Request]:
        if not overrides(policy, "order") and policy.traits.order == "waiting":
            yield from list(self.waiting) if policy.traits.blocked_head == "skip" else self._heads()
            return
        yield from self._guarded(lambda: policy.order(view))

    def _heads(self) -> Iterator[Request]:
        """The queue's head, again and again: admitting it makes the next one the head."""
        seen = None
        while (head := self.waiting.head) is not None and head is not seen:
            seen = head
            yield head

    def _victims(self, policy: Policy, needed: int, view: SchedulerView) -> Iterator[Request]:
        view.__dict__.pop("resident", None)  # as of now: others may have been preempted since it was looked up
        return self._guarded(lambda: policy.victims(needed, view))

    def _guarded(self, ask: Callable[[], Iterable[Request]]) -> Iterator[Request]:
        try:
            yield from ask()
        except Exception as error:
            raise _PolicyFailed from error

    def _tell(self, hook: str, request: Request, now: float) -> None:
        if overrides(self.policy, hook):
            view = SchedulerView(now, self.num_plans, self._info, self.waiting, self.residents, self.memory)
            try:
                getattr(self.policy, hook)(request, view)
            except Exception as error:
                self._report_policy_error(error)

    def _report_step(self, plan: StepPlan, output: StepOutput, now: float, seconds: float) -> None:
        new = {request.id: len(tokens) for request, tokens in zip(output.requests, output.tokens, strict=True)}
        items = [
            (request, int(n) if row >= plan.num_decodes else 0, new.get(request.id, 0))
            for row, (request, n) in enumerate(zip(plan.requests, plan.num_tokens, strict=True))
        ]
        view = SchedulerView(now, self.num_plans, self._info, self.waiting, self.residents, self.memory)
        try:
            self.policy.on_step(StepReport(items, seconds), view)
        except Exception as error:
            self._report_policy_error(error)

    def _report_policy_error(self, error: BaseException) -> None:
        self.num_policy_errors += 1
        cause = error.__cause__ or error
        logger.error("the scheduling policy raised %r; first come, first served stands in", cause, exc_info=cause)


def overrides(policy: Policy, method: str) -> bool:
    """Whether the policy has its own version of a method; the defaults need no view to be built."""
    return getattr(type(policy), method) is not getattr(Policy, method)
