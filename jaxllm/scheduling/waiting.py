"""WaitingQueue: the requests that own no pages, in the order of their rank (the policy's key)."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator

from jaxllm.scheduling.request import Request


class WaitingQueue:
    """A sorted queue. Newcomers usually rank last and preempted requests first, and both ends are O(1)."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def head(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def add(self, request: Request) -> None:
        queue, rank = self._requests, request.rank
        if not queue or rank >= queue[-1].rank:
            queue.append(request)
        elif rank < queue[0].rank:
            queue.appendleft(request)
        else:
            queue.insert(bisect_right(queue, rank, key=lambda other: other.rank), request)

    def remove(self, request: Request) -> None:
        if self._requests[0] is request:
            self._requests.popleft()
        else:
            self._requests.remove(request)
