"""Policy: who goes first, how the token budget is split, who gives up pages. The scheduler guarantees the rest.

A policy sees requests and a read-only view of the engine and answers with requests; it never touches pages. Whatever it
answers, no request is lost, memory is never over-committed and every step makes progress (see scheduler.py). Every
method has a default, vLLM's first-come-first-served; a policy overrides what it wants to change:

    class ShortestFirst(Policy):
        def key(self, request):
            return (request.prompt_len, request.index)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jaxllm.scheduling.request import Request


@dataclass(frozen=True)
class Traits:
    """How the scheduler shall use a policy.

    Attributes:
      order: "waiting": residents run in admission order and the policy orders those who wait; "all": it orders both,
        and a resident that it leaves out idles, keeping its pages.
      blocked_head: when the first in line does not fit, "stop" admitting or "skip" to the next.
      preempt_to_admit: whether a waiting request may displace residents that come later in the order.
      admit_after_preempt: whether anybody may be admitted in a step that preempted somebody.
    """

    order: Literal["waiting", "all"] = "waiting"
    blocked_head: Literal["stop", "skip"] = "stop"
    preempt_to_admit: bool = False
    admit_after_preempt: bool = False


@dataclass(frozen=True)
class Budget:
    """How many tokens a step may compute.

    Attributes:
      tokens: in all; never more than the engine's max_num_batched_tokens.
      prefill: of these, for rows that compute more than one token; None: no bound of its own.
      chunk: at most so many for one row; None: no bound.
    """

    tokens: int
    prefill: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class EngineInfo:
    """The sizes that do not change: tokens a page, pages, tokens a step, rows a step, tokens a sequence."""

    page_size: int
    num_pages: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int


class View(Protocol):
    """The engine at this step, read-only; the same in the engine and in a simulation."""

    now: float
    step: int
    info: EngineInfo

    @property
    def waiting(self) -> Sequence[Request]: ...  # in the order of Policy.key
    @property
    def resident(self) -> Sequence[Request]: ...  # in admission order
    @property
    def free_pages(self) -> int: ...
    def probe(self, request: Request) -> int: ...  # tokens of a waiting request that the prefix cache holds
    def pages_for(self, request: Request, num_tokens: int) -> int: ...  # pages it lacks to hold so many tokens


@dataclass(frozen=True)
class StepReport:
    """What a step did, told to the policy once a step: (request, prompt tokens computed, new tokens) of every row."""

    items: Sequence[tuple[Request, int, int]]
    seconds: float


class Policy:
    """First come, first served, as in vLLM: the scheduling policy "fcfs"."""

    traits = Traits()

    def key(self, request: Request) -> Any:
        """Ranks requests, smallest first; asked once, on arrival, and kept as `request.rank`."""
        return (request.arrival, request.index)

    def order(self, view: View) -> Iterable[Request]:
        """Who is considered, first to last; may be lazy. With traits.order "all", residents as well."""
        return view.waiting

    def budget(self, view: View) -> Budget:
        return Budget(view.info.max_num_batched_tokens)

    def reserve(self, request: Request, view: View) -> int:
        """Pages that must stay free besides those that admitting `request` takes."""
        return 0

    def victims(self, needed: int, view: View) -> Iterable[Request]:
        """Residents in the order in which they shall give up their pages when `needed` more are wanted.

        A request that meets itself in this order gives way.
        """
        return sorted(view.resident, key=lambda request: request.rank, reverse=True)

    def on_arrival(self, request: Request, view: View) -> None: ...
    def on_step(self, report: StepReport, view: View) -> None: ...
    def on_finish(self, request: Request, view: View) -> None: ...


class PriorityPolicy(Policy):
    """vLLM's "priority": the lowest number first, then by arrival; the highest number is preempted first."""

    def key(self, request: Request) -> Any:
        return (request.priority, request.arrival, request.index)


POLICIES: dict[str, type[Policy]] = {"fcfs": Policy, "priority": PriorityPolicy}


def make_policy(policy: str | Policy) -> Policy:
    """The policy of this name, or `policy` itself; ValueError names the known ones."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"scheduling_policy must be one of {sorted(POLICIES)} or a Policy object, got {policy!r}")
    return POLICIES[policy]()
