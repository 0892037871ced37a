"""What an engine has done so far, as vLLM's metrics: Counter, Gauge and Histogram objects under vLLM's names.

Nothing is counted while steps run. Finished requests are added up once each; what the unfinished ones have done is read
off them when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxllm.scheduling import Request, Scheduler

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass
class Metric:
    """A metric at one moment.

    Attributes:
      name: vLLM's, without the "_total" that a Prometheus text adds to counters.
      labels: what tells it from others of that name.
    """

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int = 0


@dataclass
class Gauge(Metric):
    """A number that goes up and down."""

    value: float = 0.0


@dataclass
class Histogram(Metric):
    """How values spread: `buckets` maps an upper bound, as text, to how many values are not above it."""

    count: int = 0
    sum: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict)


class _Distribution:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float | None) -> None:
        """Takes in a value; None is none."""
        if value is not None:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def histogram(self, name: str) -> Histogram:
        buckets, total = {}, 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets[str(bound)] = total
        return Histogram(name, count=total, sum=self._sum, buckets=buckets)


class EngineMetrics:
    """The counters of one engine."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._totals: Tally[str] = Tally()
        self._reasons: Tally[str] = Tally()
        self._distributions = {
            "vllm:time_to_first_token_seconds": _Distribution(_SECONDS),
            "vllm:e2e_request_latency_seconds": _Distribution(_SECONDS),
            "vllm:request_queue_time_seconds": _Distribution(_SECONDS),
            "vllm:request_prompt_tokens": _Distribution(_TOKENS),
            "vllm:request_generation_tokens": _Distribution(_TOKENS),
        }

    def take(self, requests: list[Request], finished_at: float) -> None:
        """Adds up a finished request: the sequences of one prompt, the first of which has its times."""
        first = requests[0]
        self._totals += _counts_of(requests)
        self._reasons.update(str(one.finish_reason) for one in requests if one.finish_reason is not None)
        values = {
            "vllm:time_to_first_token_seconds": _since(first, first.first_token_at),
            "vllm:e2e_request_latency_seconds": _since(first, finished_at),
            "vllm:request_queue_time_seconds": _since(first, first.first_scheduled_at),
            "vllm:request_prompt_tokens": first.prompt_len,
            "vllm:request_generation_tokens": sum(one.generated for one in requests),
        }
        for name, value in values.items():
            self._distributions[name].add(value)

    def read(self, unfinished: Iterable[list[Request]]) -> list[Metric]:
        """All metrics now, those of the unfinished requests included."""
        totals = self._totals + sum((_counts_of(requests) for requests in unfinished), Tally())
        pool = self._scheduler.memory.pool
        return [
            Gauge("vllm:num_requests_running", value=len(self._scheduler.residents)),
            Gauge("vllm:num_requests_waiting", value=len(self._scheduler.waiting)),
            Gauge("vllm:kv_cache_usage_perc", value=1 - pool.num_free / pool.num_pages),
            Counter("vllm:num_preemptions", value=self._scheduler.num_preemptions),
            *(Counter(name, value=totals[name]) for name in _TOTALS),
            *(
                Counter("vllm:request_success", {"finished_reason": reason}, count)
                for reason, count in sorted(self._reasons.items())
            ),
            *(distribution.histogram(name) for name, distribution in self._distributions.items()),
        ]


_TOTALS = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")


def _counts_of(requests: list[Request]) -> Tally[str]:
    """Prompt tokens count once they are computed, and once for all sequences of a request."""
    first = requests[0]
    computed = first.prompt_len if first.first_token_at is not None else 0
    scheduled = first.prompt_len if first.first_scheduled_at is not None else 0
    values = computed, sum(one.generated for one in requests), scheduled, first.num_cached_tokens
    return Tally(dict(zip(_TOTALS, values, strict=True)))


def _since(request: Request, time: float | None) -> float | None:
    return None if time is None else time - request.arrival
