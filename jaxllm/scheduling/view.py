"""SchedulerView: what a policy may see of a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jaxllm.scheduling.kv_memory import KVMemory
from jaxllm.scheduling.policy import EngineInfo
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.residents import Residents
from jaxllm.scheduling.waiting import WaitingQueue


@dataclass
class SchedulerView:
    """Implements policy.View for one step; what it has looked up once it remembers."""

    now: float
    step: int
    info: EngineInfo
    _queue: WaitingQueue
    _residents: Residents
    _memory: KVMemory
    _probes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def waiting(self) -> Sequence[Request]:
        return tuple(self._queue)

    @cached_property
    def resident(self) -> Sequence[Request]:
        return tuple(self._residents.in_order())

    @property
    def free_pages(self) -> int:
        return self._memory.pool.num_free

    def probe(self, request: Request) -> int:
        if request.id not in self._probes:
            self._probes[request.id] = len(self._memory.match(request)) * self.info.page_size
        return self._probes[request.id]

    def pages_for(self, request: Request, num_tokens: int) -> int:
        return max(self._memory.pages_for(num_tokens) - request.num_pages, 0)
