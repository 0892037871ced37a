"""Draft: a step's plan while it is being made: what is left of the token budget, and who computes how much."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxllm.scheduling.plan import IN_FLIGHT, StepPlan
from jaxllm.scheduling.policy import Budget
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.residents import Ints, Residents

_UNBOUNDED = 1 << 62


@dataclass
class Draft:
    """Attributes:
    tokens_left, prefill_left: what the budget still allows; chunk: the most that one row may compute.
    num_tokens: slot -> tokens to compute, in the order in which they were planned.
    considered: ids of the requests that had their turn in this step.
    preempted: those that lost their pages in this step; they are not admitted again in it.
    residents_done: whether the residents have had their turn; at_once: slots and counts of those planned in one go.
    may_unplan: whether a request already planned may still be preempted. Not once others may have found its pages in
      the prefix cache.
    num_steps: how many decode steps in a row; more than 1 only if nothing but decode rows is planned.
    ignore_protection: whether requests that were preempted too often may be preempted all the same.
    """

    tokens_left: int
    prefill_left: int
    chunk: int
    num_tokens: dict[int, int] = field(default_factory=dict)
    considered: set[str] = field(default_factory=set)
    preempted: list[Request] = field(default_factory=list)
    residents_done: bool = False
    at_once: tuple[Ints, Ints] | None = None
    may_unplan: bool = False
    ignore_protection: bool = False
    num_steps: int = 1

    @classmethod
    def of(cls, budget: Budget, max_tokens: int, threshold: int) -> Draft:
        """A draft within `budget`, within the engine's `max_tokens` and long-prompt `threshold` (0: none)."""
        tokens = min(max(budget.tokens, 0), max_tokens)
        prefill = _UNBOUNDED if budget.prefill is None else max(budget.prefill, 0)
        bounds = [bound for bound in (budget.chunk, threshold) if bound]
        return cls(tokens, prefill, min(bounds, default=_UNBOUNDED))

    def size(self, remaining: int) -> int:
        """How many of `remaining` tokens a row may compute."""
        allowed = min(remaining, self.chunk, self.tokens_left)
        return min(allowed, self.prefill_left) if remaining > 1 else allowed

    def sizes(self, remaining: Ints) -> Ints:
        """`size` and `take` for one row after the other, all at once; i64[rows] -> i64[rows]."""
        if int(remaining.sum()) <= min(self.tokens_left, self.prefill_left, self.chunk):
            return remaining
        wanted = np.minimum(remaining, self.chunk)
        prefill = np.where(remaining > 1, wanted, 0)
        prefill = np.clip(self.prefill_left - (np.cumsum(prefill) - prefill), 0, prefill)
        wanted = np.where(remaining > 1, prefill, wanted)
        sizes: Ints = np.clip(self.tokens_left - (np.cumsum(wanted) - wanted), 0, wanted)
        return sizes

    def take(self, slot: int, count: int, remaining: int) -> None:
        self.num_tokens[slot] = count
        self.tokens_left -= count
        if remaining > 1:
            self.prefill_left -= count

    def take_all(self, slots: Ints, counts: Ints, remaining: Ints) -> None:
        """`take` for all residents at once, before anything else is planned."""
        self.at_once = (slots, counts)
        self.tokens_left -= int(counts.sum())
        self.prefill_left -= int(counts[remaining > 1].sum())

    @property
    def empty(self) -> bool:
        return not self.num_tokens and (self.at_once is None or not len(self.at_once[0]))

    def _rows(self) -> tuple[Ints, Ints]:
        """Slots and counts, in the order in which they were planned."""
        slots = np.fromiter(self.num_tokens.keys(), np.int64, len(self.num_tokens))
        counts = np.fromiter(self.num_tokens.values(), np.int64, len(self.num_tokens))
        if self.at_once is None:
            return slots, counts
        if not self.num_tokens:
            return self.at_once
        return np.concatenate([self.at_once[0], slots]), np.concatenate([self.at_once[1], counts])

    def give_back(self, slot: int, remaining: int) -> None:
        count = self.num_tokens.pop(slot)
        self.tokens_left += count
        if remaining > 1:
            self.prefill_left += count

    def finish(self, step: int, residents: Residents) -> StepPlan:
        """The plan; marks the tokens that it will sample as in flight. Decode rows come first, longest first."""
        r = residents
        slots, counts = self._rows()
        samples = r.computed[slots] >= r.total[slots]
        decodes = samples & ((counts == 1) | (self.num_steps > 1))
        num_decodes = int(np.count_nonzero(decodes))
        if num_decodes < len(slots) or self.num_steps > 1:
            rows = np.argsort(np.where(decodes, -counts, 1), kind="stable")
            slots, counts, samples = slots[rows], counts[rows], samples[rows]
        requests = r.requests_of(slots)
        starts = r.computed[slots] - counts
        decode_slots = slots[:num_decodes]
        tokens = np.where(r.pending[decode_slots] > 0, IN_FLIGHT, r.last_token[decode_slots]).astype(np.int32)
        if num_decodes < len(slots):
            prefill = zip(requests[num_decodes:], starts[num_decodes:], counts[num_decodes:], strict=True)
            tokens = np.concatenate([tokens, *(q.tokens(int(s), int(s + n)) for q, s, n in prefill)], dtype=np.int32)
        sampled = np.where(samples, r.computed[slots] + 1 - r.total[slots], 0)
        r.total[slots] += sampled
        r.pending[slots] += sampled
        return StepPlan(
            step, slots, counts, starts, samples, num_decodes, tokens, r.take_page_updates(slots), requests,
            r.generation[slots], [request.id for request in self.preempted], self.num_steps,
        )  # fmt: skip
