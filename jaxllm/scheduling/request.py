"""Request: what the scheduler knows of one sequence. Token ids only: no text, no sampling parameters, no device.

A request is *waiting* (owns no pages), *resident* (owns a slot and pages; its running numbers live in the scheduler's
columns, where a whole batch is advanced at once) or *finished*.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from jaxllm.scheduling.residents import Residents

IntArray = npt.NDArray[np.int32]


class State(Enum):
    WAITING = "waiting"
    RESIDENT = "resident"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended; the values are vLLM's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to generate.

    Attributes:
      id: unique among the unfinished requests.
      prompt: the prompt's token ids, i32[prompt_len], at least one.
      max_new_tokens: it ends with FinishReason.LENGTH after this many tokens, at least 1.
      stop_token_ids: it ends with FinishReason.STOP when one of these is sampled.
      min_new_tokens: before this many tokens no stop token ends it.
      priority: for priority scheduling; lower is sooner.
      arrival: when it came, seconds on the engine's clock.
      tenant: whose it is, for fair scheduling.
      cache_salt: only requests with equal salts share cached pages.
      skip_reading_prefix_cache: its prompt is computed in whole, whatever is cached of it.
      stepwise: the executor must know each of its tokens before it can sample the next: none is left in flight.
      sampling: what the executor needs to know to sample for it; the scheduler does not look at it.
      data: the policy's own notes on it.
    """

    id: str
    prompt: IntArray
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    priority: int = 0
    arrival: float = 0.0
    tenant: str = ""
    cache_salt: str = ""
    skip_reading_prefix_cache: bool = False
    stepwise: bool = False
    sampling: Any = None
    data: dict[str, Any] = field(default_factory=dict)

    output_token_ids: list[int] = field(default_factory=list)
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    index: int = -1  # position among all requests ever added: breaks ties
    rank: Any = None  # the policy's key, asked once
    preemptions: int = 0
    preemptions_in_a_row: int = 0  # without a new token in between
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    slot: int = -1
    _residents: Residents | None = None
    _pages_of_tokens: list[bytes] = field(default_factory=list)

    def fork(self, id: str, output_token_ids: list[int], max_new_tokens: int) -> Request:
        """A new request that goes on from a beginning of this one's tokens: its KV pages are found in the prefix cache.

        It counts as scheduled when this one was.
        """
        return replace(
            self,
            id=id,
            max_new_tokens=max_new_tokens,
            output_token_ids=output_token_ids,
            state=State.WAITING,
            finish_reason=None,
            stop_reason=None,
            preemptions=0,
            preemptions_in_a_row=0,
            slot=-1,
            _residents=None,
            _pages_of_tokens=list(self._pages_of_tokens),
        )

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def generated(self) -> int:
        """New tokens that have been seen; one in flight does not count."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output_token_ids)

    @property
    def computed(self) -> int:
        """Tokens whose KV is in the pages, or will be when the steps in flight are done."""
        return int(self._residents.computed[self.slot]) if self._residents is not None else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        if self._residents is None:
            return self.num_tokens
        return int(self._residents.total[self.slot] - self._residents.computed[self.slot])

    @property
    def num_pages(self) -> int:
        return int(self._residents.num_pages[self.slot]) if self._residents is not None else 0

    def tokens(self, start: int, stop: int) -> IntArray:
        """Tokens [start:stop) of prompt and output together, i32[stop-start]."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        generated = np.array(self.output_token_ids[max(start - split, 0) : stop - split], np.int32)
        return generated if start >= split else np.concatenate((self.prompt[start:], generated))

    def pages_of_tokens(self, count: int, page_size: int) -> Sequence[bytes]:
        """The tokens of the first `count` full pages, one `bytes` a page: the prefix cache's keys."""
        known = self._pages_of_tokens
        if len(known) == count - 1 and (start := (count - 1) * page_size - len(self.prompt)) >= 0:
            known.append(array("i", self.output_token_ids[start : start + page_size]).tobytes())
        elif len(known) < count:
            fresh = self.tokens(len(known) * page_size, count * page_size).tobytes()
            width = page_size * 4
            known.extend(fresh[i : i + width] for i in range(0, len(fresh), width))
        return known if len(known) == count else known[:count]
