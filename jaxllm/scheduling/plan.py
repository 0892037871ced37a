"""StepPlan: what one step of the device shall do, as plain data; and StepOutput: what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    A plan of decode rows alone may be for several steps in a row, each row's tokens fed back without the host's doing:
    row i takes part in the first num_tokens[i] of them. Such rows are sorted, the longest first.

    Attributes:
      step: counts the plans of a scheduler.
      num_steps: device steps in a row; 1 unless all rows decode.
      slots: i64[S], the slot of each row.
      num_tokens: i64[S], tokens to compute, at least 1.
      starts: i64[S], tokens computed before this step.
      samples: bool[S], whether a new token follows the row's (false for a prompt's earlier chunks).
      num_decodes: how many of the rows are decode rows.
      tokens: i32[sum(num_tokens)], the rows' token ids one after the other; IN_FLIGHT where only the device knows them.
        For several steps i32[S], those of the first.
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
    num_steps: int = 1

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    def split(self, sizes: Sequence[int]) -> Iterator[StepPlan]:
        """The plan in parts of so many steps, which add up to num_steps. The page updates are all with the first."""
        if len(sizes) == 1:
            yield self
            return
        step = 0
        for size in sizes:
            rows = int(np.count_nonzero(self.num_tokens > step))
            yield StepPlan(
                step=self.step,
                slots=self.slots[:rows],
                num_tokens=np.minimum(self.num_tokens[:rows] - step, size),
                starts=self.starts[:rows] + step,
                samples=self.samples[:rows],
                num_decodes=rows,
                tokens=self.tokens if step == 0 else np.full(rows, IN_FLIGHT, np.int32),
                page_updates=self.page_updates if step == 0 else self.page_updates[:0],
                num_steps=size,
            )
            step += size

    def __str__(self) -> str:
        rows = ", ".join(f"{r.id}+{n}" for r, n in zip(self.requests, self.num_tokens, strict=True))
        tail = f"; preempted {', '.join(self.preempted)}" if self.preempted else ""
        return f"step {self.step}: {rows or 'nothing'}{tail}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that a recorded run must repeat, in JSON's types."""
        return {
            "step": self.step,
            "num_steps": self.num_steps,
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
      requests: those that got tokens (rows that sampled, and are still wanted).
      tokens: the new tokens of each, one for each of the plan's steps at most.
      rows: i64[len(requests)], the plan's row of each, to find its log probabilities by.
      finished: those of `requests` that ended with these tokens.
    """

    requests: list[Request]
    tokens: list[list[int]]
    rows: Ints
    finished: list[Request]
