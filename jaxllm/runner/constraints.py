"""What the host says about a request's next token: masks that depend on its answer so far, and logits processors.

A request with any of these is sampled one token at a time: the host must have seen its last token before it can say
what may follow (`Request.stepwise`). The device computes the step's forward pass meanwhile.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np

from jaxllm.runner.controls import bitmask
from jaxllm.scheduling.request import Request

logger = logging.getLogger(__name__)


class Constraint(Protocol):
    """Says what may follow a request's answer. Each request has its own, so it may remember what it has seen."""

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        """i32[V/32] with the bits of the tokens that may follow the answer `tokens`, which only grows; None: all."""
        ...

    def fork(self) -> Self:
        """One for another answer that begins as this one does."""
        ...


class BadWords:
    """Keeps token sequences out: the last token of one is not sampled after the others of it (as in vLLM).

    Args:
      words: sequences of at least two tokens; single ones need no host (SamplingSpec.banned_ids).
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._words, self._vocab_size = [list(word) for word in words], vocab_size

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        ends = [word[-1] for word in self._words if list(tokens[-len(word) + 1 :]) == word[:-1]]
        return ~bitmask(ends, self._vocab_size) if ends else None

    def fork(self) -> Self:
        return self


class ThinkingBudget:
    """Forces the closing reasoning marker, token by token, after `budget` tokens behind the opening one.

    Args:
      prompt: the prompt's token ids, in which the reasoning may already have begun.
      start, end: the markers' token ids.

    Attributes:
      closed: of how many tokens the answer was when a closing marker first ended its reasoning; 0 if none has.
    """

    closed = 0

    def __init__(
        self, prompt: Sequence[int], start: Sequence[int], end: Sequence[int], budget: int, vocab_size: int
    ) -> None:
        self.start, self._end, self._budget, self._vocab_size = list(start), list(end), budget, vocab_size
        self._read = 0  # tokens of the answer that have been taken in
        self._forced = 0  # tokens of the closing marker that have been forced
        self._tail: list[int] = []
        self._thought: int | None = None  # tokens since the opening marker; None outside of the reasoning
        for token in prompt:
            self._take(token)

    def mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        for token in tokens[self._read :]:
            self._read += 1
            if self._exhausted:
                self._force_next()
            else:
                self._take(token)
        return bitmask([self._end[self._forced]], self._vocab_size) if self._exhausted else None

    def fork(self) -> Self:
        return copy.copy(self)

    @property
    def thinking(self) -> bool:
        """Whether the tokens so far end inside of the reasoning."""
        return self._thought is not None

    @property
    def _exhausted(self) -> bool:
        return self._thought is not None and self._thought >= self._budget

    def _force_next(self) -> None:
        self._forced += 1
        if self._forced == len(self._end):
            self._forced, self._tail = 0, []
            self._close()

    def _close(self) -> None:
        if self._thought is not None:
            self._thought, self.closed = None, self.closed or self._read

    def _take(self, token: int) -> None:
        self._tail = [*self._tail, token][-max(len(self.start), len(self._end)) :]
        if self._tail[-len(self._end) :] == self._end:
            self._close()
        elif self._tail[-len(self.start) :] == self.start:
            self._thought = 0
        elif self._thought is not None:
            self._thought += 1


class FixedTokens:
    """The same tokens throughout, for a request whose other constraints may leave none of them: that ends it.

    Args:
      allowed: None for all. banned: tokens that are not.
    """

    def __init__(self, allowed: Sequence[int] | None, banned: Sequence[int], vocab_size: int) -> None:
        everything = np.arange(vocab_size) if allowed is None else allowed
        self._mask = bitmask(everything, vocab_size) & ~bitmask(banned, vocab_size)

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        return self._mask

    def fork(self) -> Self:
        return self


def combined_mask(
    constraints: Sequence[Constraint], tokens: Sequence[int], may_be_empty: bool = False
) -> np.ndarray | None:
    """What all constraints allow after the answer `tokens`; None: everything.

    Raises: ValueError if they allow nothing, unless that `may_be_empty`.
    """
    masks = [mask for one in constraints if (mask := one.mask(tokens)) is not None]
    if not masks:
        return None
    combined = np.bitwise_and.reduce(masks)
    if not (may_be_empty or combined.any()):
        names = ", ".join(type(one).__name__ for one in constraints)
        raise ValueError(f"after {len(tokens)} tokens the request's constraints ({names}) leave no token")
    return combined


def takes_prompt(processor: Callable[..., Any]) -> bool:
    """Whether a logits processor wants (prompt ids, output ids, logits) rather than (output ids, logits)."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in positional and one.default is one.empty for one in parameters) == 3


def run_processors(request: Request, logits: np.ndarray) -> np.ndarray:
    """f32[V] logits after the request's logits processors. Raises what they raise, and ValueError for a wrong shape."""
    shape = logits.shape
    for processor in request.sampling.logits_processors:
        tokens = list(request.output_token_ids)
        arguments = (request.prompt.tolist(), tokens) if takes_prompt(processor) else (tokens,)
        logits = np.array(processor(*arguments, logits), np.float32)
        if logits.shape != shape:
            raise ValueError(f"logits_processors: {processor!r} returned shape {logits.shape} for logits {shape}")
    return logits


def check_something_is_left(request: Request, logits: np.ndarray, mask: np.ndarray | None) -> None:
    """Raises ValueError if the masks allow no token whose logit, of f32[V], is above -inf: the constraints' (i32[V/32],
    None: all) and those that the device applies. A beam that nothing may follow ends without a word."""
    spec, size = request.sampling, len(logits)
    if spec.processed_logprobs:
        return
    left = logits > -np.inf
    if mask is not None:
        left &= np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)
    if spec.allowed_ids is not None:
        left &= np.isin(np.arange(size), spec.allowed_ids)
    left[list(spec.banned_ids)] = False
    if len(request.output_token_ids) < spec.min_tokens:
        left[list(spec.masked_ids)] = False
    if not left.any():
        raise ValueError("the request's logits_processors and masks leave no token that may follow")
