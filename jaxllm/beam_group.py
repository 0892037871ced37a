"""BeamGroup: a request with a beam search as the engine sees it, between the bookkeeping and the scheduler.

Each beam's next token is a request of its own to the scheduler: it begins with the prompt and the beam's tokens, asks
for one token and ends. So beams are scheduled, preempted and batched as anything else, and nothing waits for a beam
that is late but its own search. Full KV pages are shared between beams, and from step to step, through the prefix
cache; a beam computes the tokens of its last, partial page anew. (Without prefix caching it computes all of them.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxllm.beam_search import BeamSearch, num_candidates
from jaxllm.logprobs import PromptLogprobs, likeliest, logprob_dict
from jaxllm.outputs import Logprob, RequestMetrics, RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import FinishReason, Request
from jaxllm.sequence import Sequence


class BeamSequence(Sequence):
    """A beam. The token that its request samples is none of its own: what counts are the log probabilities with it."""

    step: tuple[Any, int] | None = None  # a step's runner.logprobs.Logprobs and this beam's row in it
    _likeliest: tuple[list[int], list[float]] = ([], [])

    @property
    def watches(self) -> bool:
        return False

    @property
    def may_end_by_text(self) -> bool:
        return super().watches

    def add_logprobs(self, token: int, row: int, logprobs: Any) -> None:
        self.step = logprobs, row
        self._likeliest = likeliest(logprobs, row, -1)

    def candidates(self, count: int) -> list[tuple[int, float]]:
        """The likeliest next tokens and their log probabilities."""
        ids, values = self._likeliest
        return list(zip(ids[:count], values[:count], strict=True))

    def grown(self, request: Request) -> BeamSequence:
        """This beam with the last token of `request`, one of the candidates."""
        ids, values = self._likeliest
        token = request.output_token_ids[-1]
        place = ids.index(token)
        child = self.fork(request, values[place], self._entry(token, values[place], place + 1))
        child.step, child._likeliest = None, ([], [])
        return child

    def _entry(self, token: int, logprob: float, rank: int) -> dict[int, Logprob] | None:
        if self.logprobs is None:
            return None
        assert self.step is not None
        logprobs, row = self.step
        count, wanted = self.params.logprobs or 0, self.params.logprob_token_ids or ()
        own = logprobs._replace(token={row: logprob}, rank={row: rank})  # of the beam's token, not the sampled one
        return logprob_dict(own, row, token, count, wanted, self._token_text)


@dataclass
class BeamGroup:
    """A request as its caller sees it: one prompt, and the best answers found.

    Attributes:
      max_tokens: the longest answer that max_tokens and the engine's max_model_len allow.
      stop_ids: tokens that end a beam.
      sequences: the running beams, whose requests the scheduler has; at the end the answers.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_logprobs: PromptLogprobs
    sequences: list[BeamSequence]
    streaming: bool
    arrival: float
    max_tokens: int
    stop_ids: frozenset[int]
    finished_time: float | None = None
    finished: bool = False
    _length: int = 0  # tokens of each running beam
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        params = self.params
        self.search: BeamSearch[BeamSequence] = BeamSearch(
            self.sequences[0], params.num_sequences, self.max_tokens, params.length_penalty, params.early_stopping
        )

    @property
    def step_done(self) -> bool:
        """Whether every beam has its candidates for the next token."""
        return all(sequence.step is not None for sequence in self.sequences)

    def advance(self) -> None:
        """Takes the search a token further; then `sequences` are new, and so are their requests."""
        count = num_candidates(self.search.width, len(self.stop_ids))
        self.search.extend([sequence.candidates(count) for sequence in self.sequences], self._grow)
        if not self.search.done:
            self.sequences = [beam.item for beam in self.search.running]
            self._length = self.search.length
        elif self.search.finished:
            self.sequences = [one.item for one in self.search.finished]
            self.finished = True
        else:  # there was nothing that might follow
            self.end(FinishReason.ERROR)

    def _grow(self, beam: BeamSequence, token: int) -> tuple[BeamSequence, bool]:
        tokens = [*beam.request.output_token_ids[: self._length], token]
        request = beam.request.fork(f"{self.request_id}/{next(self._ids)}", tokens, len(tokens) + 1)
        child = beam.grown(request)
        if len(tokens) == self.max_tokens:
            request.finish_reason = FinishReason.LENGTH
        if token in self.stop_ids and len(tokens) >= self.params.min_tokens:
            request.finish_reason, request.stop_reason = FinishReason.STOP, token
        if child.may_end_by_text and (reason := child.catch_up()):
            request.finish_reason = reason
        return child, request.finish_reason is not None

    def end(self, reason: FinishReason) -> None:
        """Ends the search where it stands: what the beams have so far are its answers."""
        for sequence in self.sequences:
            del sequence.request.output_token_ids[self._length :]  # sampled, but no beam's
            sequence.request.finish_reason = reason
        self.finished = True

    def output(self) -> RequestOutput:
        first = self.sequences[0].request
        best = self.sequences[: self.params.n]
        for index, sequence in enumerate(best):
            sequence.index = index
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output(holding_back=self.streaming) for sequence in best],
            finished=self.finished,
            metrics=RequestMetrics(self.arrival, first.first_scheduled_at, first.first_token_at, self.finished_time),
            prompt_logprobs=self.prompt_logprobs.dicts,
            prompt_token_id_logprobs=self.prompt_logprobs.matrix,
            num_cached_tokens=first.num_cached_tokens,
        )


def check_beam_search(params: SamplingParams, num_stop_tokens: int, vocab_size: int, max_logprobs: int) -> None:
    """Raises ValueError if the engine's max_logprobs is too low for so many beams."""
    needed = min(num_candidates(params.num_sequences, num_stop_tokens), vocab_size)
    if max_logprobs != -1 and needed > max_logprobs:
        raise ValueError(
            f"a beam search with {params.num_sequences} beams needs the {needed} likeliest tokens of each, which "
            f"exceeds the engine's max_logprobs={max_logprobs}: raise it, or lower best_of (beam_width)"
        )
