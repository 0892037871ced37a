"""StepPlan: what one step of the device shall do, as plain data; and StepOutput: what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.scheduling.request import IntArray, Request
from jaxllm.scheduling.residents import Ints

IN_FLIGHT = -1  # in `tokens`: the token that the previous step sampled for this slot, not yet seen by the host


def _no_ints() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(eq=False, slots=True)
class StepPlan:
    """One step over S rows: first the decode rows (one token each), then the prefill rows.

    Attributes:
      step: counts the plans of a scheduler.
      slots: i64[S], the slot of each row.
      num_tokens: i64[S], tokens to compute, at least 1.
      starts: i64[S], tokens computed before this step.
      samples: bool[S], whether the row's last token is followed by a new one (false for a prompt's earlier chunks).
      num_decodes: how many of the rows are decode rows.
      tokens: i32[sum(num_tokens)], the rows' token ids one after the other; IN_FLIGHT where the device knows them.
      page_updates: i64[U, 3], rows (slot, column, page) to write into the page table before the step.
      requests: the requests of the rows.
      generations: i64[S], the slots' tenancies at planning time.
      preempted: ids of the requests that gave up their pages for this step.
    """

    step: int
    slots: Ints = field(default_factory=_no_ints)
    num_tokens: Ints = field(default_factory=_no_ints)
    starts: Ints = field(default_factory=_no_ints)
    samples: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, np.bool_))
    num_decodes: int = 0
    tokens: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    page_updates: Ints = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    requests: list[Request] = field(default_factory=list)
    generations: Ints = field(default_factory=_no_ints)
    preempted: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    def __str__(self) -> str:
        rows = ", ".join(f"{r.id}+{n}" for r, n in zip(self.requests, self.num_tokens, strict=True))
        tail = f"; preempted {', '.join(self.preempted)}" if self.preempted else ""
        return f"step {self.step}: {rows or 'nothing'}{tail}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that a recorded run must repeat, in JSON's types."""
        return {
            "step": self.step,
            "requests": [request.id for request in self.requests],
            "num_tokens": self.num_tokens.tolist(),
            "starts": self.starts.tolist(),
            "num_decodes": self.num_decodes,
            "page_updates": self.page_updates.tolist(),
            "preempted": list(self.preempted),
        }


@dataclass(eq=False, slots=True)
class StepOutput:
    """What a step added to its requests.

    Attributes:
      requests: those that got a token (rows that sampled, and are still wanted).
      tokens: the token of each.
      rows: i64[len(requests)], the plan's row of each, to find its log probabilities by.
      finished: those of `requests` that ended with this token.
    """

    requests: list[Request]
    tokens: list[int]
    rows: Ints
    finished: list[Request]
