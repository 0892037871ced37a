"""Log probabilities of prompts: logits of every prompt position, a chunk of positions at a time.

A step's forward pass makes logits of each row's last token alone. For requests that want their prompt scored, the
hidden states of the other positions are gathered, from all such rows of the step together, and taken to logits CHUNK
at a time: so the memory for it is that of CHUNK rows, however long the prompts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.interface import Network, Params
from jaxllm.runner.controls import MAX_WANTED
from jaxllm.runner.logprobs import WHOLE_VOCABULARY, Logprobs, log_probabilities
from jaxllm.scheduling import StepPlan
from jaxllm.scheduling.request import Request

CHUNK = 256  # positions


@dataclass(frozen=True)
class PromptProgram:
    """A program's key: the gathering of hidden states from T tokens, or (T = 0) the scoring of a chunk."""

    num_tokens: int = 0

    def __str__(self) -> str:
        return f"gather from {self.num_tokens}" if self.num_tokens else "prompt logprobs"


class Positions(NamedTuple):
    """Prompt positions to score, as arrays over them.

    index: i64[C] in the step's flat tokens; target: i32[C] the token that follows; wanted_ids: i32[C, MAX_WANTED].
    """

    index: np.ndarray
    target: np.ndarray
    wanted_ids: np.ndarray


class PromptScores:
    """The log probabilities of a step's prompt positions, fetched from the device when somebody looks."""

    def __init__(self, spans: list[tuple[Request, int, int]], chunks: list[Logprobs]) -> None:
        self._spans, self._chunks = spans, chunks

    def __iter__(self) -> Iterator[tuple[Request, int, Logprobs]]:
        """Each scored request, the first of its positions and their log probabilities, in NumPy arrays."""
        if not self._spans:
            return
        whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *self._chunks)
        start = 0
        for request, first, count in self._spans:
            stop = start + count
            yield request, first, jax.tree.map(lambda x, a=start, b=stop: x[a:b], whole)
            start = stop


class PromptScorer:
    """Scores the prompt positions of a step.

    Args:
      programs: compiled program of a PromptProgram.
    """

    def __init__(self, network: Network, max_logprobs: int, programs: Callable[[PromptProgram], Any]) -> None:
        self._network, self._max_logprobs, self._programs = network, max_logprobs, programs

    def submit(self, params: Params, plan: StepPlan, scored: np.ndarray, hidden: jax.Array) -> PromptScores:
        """Hands the prompt positions of the `scored` rows to the device; `hidden` [T, D] are the step's."""
        spans, positions = positions_of(plan, scored)
        chunks = []
        for start in range(0, len(positions.index), CHUNK):
            index, target, wanted = (_padded(x[start : start + CHUNK]) for x in positions)
            gathered = self._programs(PromptProgram(hidden.shape[0]))(hidden, index)
            chunk = self._programs(PromptProgram())(params, gathered, target, wanted)
            if self._max_logprobs == WHOLE_VOCABULARY:  # the device has room for one such chunk
                chunk = jax.tree.map(np.asarray, chunk)
            chunks.append(chunk)
        return PromptScores(spans, chunks)

    def lower(self, key: PromptProgram, params: Any) -> jax.stages.Lowered:
        """`params` as shapes."""
        width, dtype = self._network.config.hidden_size, self._network.dtype
        index = jax.ShapeDtypeStruct((CHUNK,), jnp.int32)
        if key.num_tokens:
            hidden = jax.ShapeDtypeStruct((key.num_tokens, width), dtype)
            return jax.jit(lambda hidden, index: hidden[index]).lower(hidden, index)
        wanted = jax.ShapeDtypeStruct((CHUNK, MAX_WANTED), jnp.int32)
        return jax.jit(self._score).lower(params, jax.ShapeDtypeStruct((CHUNK, width), dtype), index, wanted)

    def _score(self, params: Params, hidden: jax.Array, target: jax.Array, wanted_ids: jax.Array) -> Logprobs:
        return log_probabilities(self._network.logits(params, hidden), target, wanted_ids, self._max_logprobs)


def positions_of(plan: StepPlan, scored: np.ndarray) -> tuple[list[tuple[Request, int, int]], Positions]:
    """(request, first position, count) of those `scored` rows that compute prompt positions, and these together.

    The prompt's last position is none of them: the token after it is the answer's. A request that was preempted after
    its first token has had its prompt scored.
    """
    spans, parts = [], [Positions(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, MAX_WANTED), np.int32))]
    offsets = np.cumsum(plan.num_tokens) - plan.num_tokens - plan.starts
    for row in scored.tolist():
        request, start, offset = plan.requests[row], int(plan.starts[row]), int(offsets[row])
        first = max(start, request.sampling.first_scored)
        stop = min(start + int(plan.num_tokens[row]), request.prompt_len - 1)
        if request.output_token_ids or first >= stop:
            continue
        wanted = np.full((stop - first, MAX_WANTED), -1, np.int32)
        wanted[:, : len(request.sampling.prompt_logprob_ids)] = request.sampling.prompt_logprob_ids
        spans.append((request, first, stop - first))
        parts.append(Positions(np.arange(first, stop) + offset, request.prompt[first + 1 : stop + 1], wanted))
    return spans, Positions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros((CHUNK, *values.shape[1:]), np.int32)
    padded[: len(values)] = values
    return padded
