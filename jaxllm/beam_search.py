"""BeamSearch: which beams go on, which have ended, and when the search is over. Plain Python: no engine, no device.

The rules are those of transformers' `generate(num_beams=...)`, from which vLLM's descend: of all beams' extensions by
one token, best first, those that end among the first `width` are finished answers, and the first `width` that do not
end are the next beams. A finished answer's score is its cumulative log probability / (its tokens ** length_penalty),
the token that ended it counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Beam(Generic[T]):
    """A beam that goes on: what the caller knows it as, and its cumulative log probability."""

    item: T
    logprob: float


@dataclass(frozen=True)
class Finished(Generic[T]):
    """A beam that has ended, with its score."""

    item: T
    score: float


class BeamSearch(Generic[T]):
    """One prompt's beam search.

    Args:
      first: the beam without tokens. Beams are the caller's: the search only hands them back.
      width: beams, and finished answers to keep, at least 1.
      max_tokens: every beam ends at this length, at least 1.
      length_penalty: above 0 favours long answers, below 0 short ones.
      early_stopping: when a search with `width` finished answers is over. True: at once. False: when the best beam,
        were it to end now, would not score better than the worst of them. "never": when no beam can ever do so.

    Attributes:
      running: the beams, best first. finished: the answers so far, best first.
      length: tokens of each running beam.
      done: whether it is over; then nothing more may be asked of it.
    """

    def __init__(
        self, first: T, width: int, max_tokens: int, length_penalty: float = 1.0, early_stopping: bool | str = False
    ) -> None:
        self.width, self.max_tokens = width, max_tokens
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.running: list[Beam[T]] = [Beam(first, 0.0)]
        self.finished: list[Finished[T]] = []
        self.length = 0
        self.done = False

    def extend(
        self, candidates: Sequence[Sequence[tuple[int, float]]], grow: Callable[[T, int], tuple[T, bool]]
    ) -> None:
        """Takes every beam a token further.

        Args:
          candidates: for each running beam its likeliest next tokens with their log probabilities; see num_candidates.
            A log probability that is not finite stands for a token that may not follow.
          grow: (beam, token) -> (the beam with this token, whether it ends with it). At max_tokens every beam ends.
        """
        self.length += 1
        at_limit = self.length == self.max_tokens
        running: list[Beam[T]] = []
        ended: list[Finished[T]] = []
        for place, (logprob, parent, token) in enumerate(self._best_first(candidates)):
            if place >= self.width and (at_limit or len(running) == self.width):
                break
            item, ends = grow(parent.item, token)
            if ends or at_limit:
                # Behind the first `width` it is there only to make up for those that end.
                ended += [Finished(item, self._score(logprob, self.length))] if place < self.width else []
            elif len(running) < self.width:
                running.append(Beam(item, logprob))
        self.running = running
        self.finished = sorted([*self.finished, *ended], key=lambda one: one.score, reverse=True)[: self.width]
        self.done = not running or self._is_over()

    def _best_first(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> Iterator[tuple[float, Beam[T], int]]:
        found = [
            (beam.logprob + logprob, beam, token)
            for beam, tokens in zip(self.running, candidates, strict=True)
            for token, logprob in tokens
            if math.isfinite(logprob)
        ]
        return iter(sorted(found, key=lambda one: one[0], reverse=True))

    def _is_over(self) -> bool:
        if len(self.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        longest = self.early_stopping == "never" and self.length_penalty > 0
        best = self._score(self.running[0].logprob, self.max_tokens if longest else self.length)
        return best <= self.finished[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty


def num_candidates(width: int, num_stop_tokens: int) -> int:
    """How many candidates `BeamSearch.extend` needs of each beam: `width` that go on, were all stop tokens before them.

    At least twice the width, for what else may end a beam (a stop string).
    """
    return width + max(width, num_stop_tokens)
