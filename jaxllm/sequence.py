"""Sequence: one answer while it grows: its text, stop strings and log probabilities. No scheduling, no device."""

from __future__ import annotations

import copy
from typing import Any, Self

from jaxllm.detokenizer import PRIMING_TOKENS, TextStream
from jaxllm.logprobs import logprob_dict
from jaxllm.outputs import CompletionOutput, Logprob
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import FinishReason, Request
from jaxllm.tokenizer import Tokenizer


class Sequence:
    """Turns a scheduler Request's tokens into a CompletionOutput.

    Tokens are read from the request itself, so that nothing need be done for them while nobody looks: `catch_up` takes
    in whatever is new. Only a sequence with stop strings, or whose repetitions are looked for, has to be looked at
    after every step (`watches`).

    Attributes:
      cumulative_logprob: the sum over the tokens taken in so far, where log probabilities are (`takes_logprobs`).
    """

    def __init__(
        self,
        request: Request,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_token_id: int | None,
    ) -> None:
        self.request, self.index, self.params = request, index, params
        self._tokenizer, self._eos_token_id = tokenizer if params.detokenize else None, eos_token_id
        self._stream: TextStream | None = None
        self._read = 0  # tokens whose text is in `text`
        self.text = ""
        self.stop_string: str | None = None
        self._ended = False  # by a stop string or a repetition
        self.takes_logprobs = (
            params.logprobs is not None
            or bool(params.logprob_token_ids)
            or params.num_sequences > params.n
            or params.use_beam_search
        )
        wants_dicts = params.logprobs is not None or bool(params.logprob_token_ids)
        self.logprobs: list[dict[int, Logprob]] | None = [] if wants_dicts else None
        self._token_logprobs: list[float] = []
        self._shown_text = self._shown_tokens = 0  # characters and tokens that an output has held
        self.has_told_its_end = False  # an output has held the finish_reason

    @property
    def watches(self) -> bool:
        """Whether it must be looked at after every token."""
        return bool(self.params.stop) or self.params.repetition_detection is not None

    @property
    def cumulative_logprob(self) -> float:
        return sum(self._token_logprobs)

    def fork(self, request: Request, logprob: float, entry: dict[int, Logprob] | None) -> Self:
        """A sequence that has taken in what this one has; `request` has one token more, with this log probability.

        Args:
          entry: what `logprobs` is to say of the token; None if the sequence keeps none.
        """
        other = copy.copy(self)
        other.request = request
        other._stream = None if self._stream is None else self._stream.fork()
        other._token_logprobs = [*self._token_logprobs, logprob]
        if self.logprobs is not None and entry is not None:
            other.logprobs = [*self.logprobs, entry]
        return other

    def catch_up(self) -> FinishReason | None:
        """Takes in new tokens; why the answer ends with them, if a stop string or a repetition ends it (it is cut)."""
        tokens = self.request.output_token_ids
        while self._read < len(tokens) and not self._ended:
            token = tokens[self._read]
            self._read += 1
            piece = self._text_of_next(token)
            if piece and self._read > self.params.min_tokens and self._cut_at_stop(len(piece)):
                return FinishReason.STOP
            if self._repeats():
                self._cut_tokens()
                return FinishReason.REPETITION
        return None

    def _repeats(self) -> bool:
        """Whether the tokens read so far end with a repetition. A stop token or the length goes before it."""
        detection, tokens = self.params.repetition_detection, self.request.output_token_ids
        ended = self.request.finish_reason is not None and self._read == len(tokens)
        if detection is None or ended or self._read < self.params.min_tokens:
            return False
        longest = detection.max_pattern_size * detection.min_count
        return detection.found_in(tokens[max(self._read - longest, 0) : self._read])

    def _text_of_next(self, token: int) -> str:
        """Appends the text that the next token completes, and returns it."""
        if self._tokenizer is None or self._ends_with(token):
            return ""
        if self._stream is None:
            tail = self.request.prompt[-PRIMING_TOKENS:].tolist()
            params = self.params
            self._stream = self._tokenizer.stream(
                tail, params.skip_special_tokens, params.spaces_between_special_tokens
            )
        piece = self._stream.add(token)
        self.text += piece
        return piece

    def _ends_with(self, token: int) -> bool:
        """Whether this is the stop token that ended the request; its text is not part of the answer."""
        stopped = self.request.finish_reason is FinishReason.STOP and self.request.stop_reason == token
        return (
            stopped and self._read == len(self.request.output_token_ids) and not self.params.include_stop_str_in_output
        )

    def _cut_at_stop(self, new: int) -> bool:
        found = [
            (at, stop)
            for stop in self.params.stop or ()
            if (at := self.text.find(stop, max(len(self.text) - new - len(stop) + 1, 0))) >= 0
        ]
        if not found:
            return False
        self._cut_tokens()
        at, self.stop_string = min(found, key=lambda pair: pair[0])
        self.text = self.text[: at + len(self.stop_string) * self.params.include_stop_str_in_output]
        return True

    def _cut_tokens(self) -> None:
        """Of several tokens that came at once, those after the end are not part of the answer."""
        self._ended = True
        del self.request.output_token_ids[self._read :]
        del self._token_logprobs[self._read :]
        if self.logprobs is not None:
            del self.logprobs[self._read :]

    def add_logprobs(self, token: int, row: int, logprobs: Any) -> None:
        """Takes in a token's log probabilities from a step's (runner.logprobs.Logprobs of NumPy arrays)."""
        self._token_logprobs.append(float(logprobs.token[row]))
        if self.logprobs is not None:
            wanted, count = self.params.logprob_token_ids or (), self.params.logprobs or 0
            self.logprobs.append(logprob_dict(logprobs, row, token, count, wanted, self._token_text))

    def _token_text(self, token: int) -> str | None:
        return self._tokenizer.token_text(token) if self._tokenizer is not None else None

    def output(self, holding_back: bool = False, delta: bool = False) -> CompletionOutput:
        """The answer so far, or with `delta` what is new since the output before.

        `holding_back` leaves out an end of the text that may turn out to begin a stop string.
        """
        self.catch_up()
        request = self.request
        finished = request.finish_reason is not None
        text = self.text
        if holding_back and not finished and not self.params.include_stop_str_in_output:
            hidden = max((len(stop) for stop in self.params.stop or ()), default=1) - 1
            text = text[: max(len(text) - hidden, 0)]
        characters, tokens = (self._shown_text, self._shown_tokens) if delta else (0, 0)
        self._shown_text, self._shown_tokens = len(text), len(request.output_token_ids)
        self.has_told_its_end = finished
        return CompletionOutput(
            index=self.index,
            text=text[characters:],
            token_ids=request.output_token_ids[tokens:],
            cumulative_logprob=self.cumulative_logprob if self.takes_logprobs else None,
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            finish_reason=request.finish_reason.value if request.finish_reason is not None else None,
            stop_reason=self._stop_reason(),
        )

    def _stop_reason(self) -> int | str | None:
        if self.stop_string is not None:
            return self.stop_string
        if self.request.finish_reason is FinishReason.REPETITION:
            return "repetition_detected"
        reason = self.request.stop_reason
        return None if reason == self._eos_token_id else reason
