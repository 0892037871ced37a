"""From the device's arrays of log probabilities to vLLM's dicts, one a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxllm.outputs import Logprob
from jaxllm.sampling_params import SamplingParams

TokenText = Callable[[int], str | None]


def logprob_dict(
    logprobs: Any, row: int, token: int, count: int, wanted_ids: Sequence[int], text_of: TokenText
) -> dict[int, Logprob]:
    """{token id: Logprob} of one row: the token's own, then the `count` likeliest, or else those of `wanted_ids`.

    Args:
      logprobs: runner.logprobs.Logprobs of NumPy arrays.
      count: -1 for the whole vocabulary.
    """
    entry = {token: Logprob(float(logprobs.token[row]), int(logprobs.rank[row]), text_of(token))}
    if wanted_ids:
        for other, value in zip(wanted_ids, logprobs.wanted[row].tolist(), strict=False):
            if other not in entry:
                entry[other] = Logprob(value, None, text_of(other))
        return entry
    ids, values = likeliest(logprobs, row, count)
    for rank, (other, value) in enumerate(zip(ids, values, strict=True), 1):
        if other not in entry:
            entry[other] = Logprob(value, rank, text_of(other))
    return entry


def likeliest(logprobs: Any, row: int, count: int) -> tuple[list[int], list[float]]:
    """The `count` likeliest tokens of one row, or all for -1, and their log probabilities; the likeliest first."""
    values = logprobs.top[row]
    count = len(values) if count == -1 else count
    if logprobs.top_ids is not None:
        return logprobs.top_ids[row, :count].tolist(), values[:count].tolist()
    ids = np.argsort(-values, kind="stable")[:count]
    return ids.tolist(), values[ids].tolist()


class PromptLogprobs:
    """The log probabilities of a prompt's tokens while its chunks are computed.

    Attributes:
      dicts: one {token id: Logprob} a prompt token, None for the first, which follows nothing; None if not asked for.
      matrix: f32[rows, K], a row a prompt position from `prompt_logprob_start` on, of the tokens after it; likewise.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], text_of: TokenText) -> None:
        self._params, self._prompt, self._text_of = params, prompt, text_of
        self._wanted = tuple(params.prompt_logprob_token_ids or ())
        self._start = params.prompt_logprob_start or 0
        rows = max(len(prompt) - 1 - self._start, 0)
        self.dicts: list[dict[int, Logprob] | None] | None = None if params.prompt_logprobs is None else [None]
        self.matrix = np.full((rows, len(self._wanted)), np.nan, np.float32) if self._wanted else None

    def take(self, first: int, logprobs: Any) -> None:
        """Takes in the rows of positions first, first + 1, ...; those seen before a preemption may come again."""
        for row in range(len(logprobs.token)):
            position = first + row
            if self.dicts is not None and position + 1 == len(self.dicts):
                token = int(self._prompt[position + 1])
                count = self._params.prompt_logprobs
                self.dicts.append(logprob_dict(logprobs, row, token, count, (), self._text_of))
        if self.matrix is not None and (skipped := max(self._start - first, 0)) < len(logprobs.token):
            at = first + skipped - self._start
            values = logprobs.wanted[skipped:, : len(self._wanted)]
            self.matrix[at : at + len(values)] = values
