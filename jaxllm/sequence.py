"""Sequence: one answer while it grows: its text, stop strings and log probabilities. No scheduling, no device."""

from __future__ import annotations

from typing import Any

from jaxllm.detokenizer import PRIMING_TOKENS, TextStream
from jaxllm.outputs import CompletionOutput, Logprob
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import FinishReason, Request
from jaxllm.tokenizer import Tokenizer


class Sequence:
    """Turns a scheduler Request's tokens into a CompletionOutput.

    Tokens are read from the request itself, so that nothing need be done for them while nobody looks: `catch_up` takes
    in whatever is new. Only a sequence with stop strings has to be looked at after every step (`watches`).
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
        self._tokenizer, self._eos_token_id = tokenizer, eos_token_id
        self._stream: TextStream | None = None
        self._read = 0  # tokens whose text is in `text`
        self.text = ""
        self.stop_string: str | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []

    @property
    def watches(self) -> bool:
        """Whether its text must be read after every token."""
        return bool(self.params.stop) and self._tokenizer is not None

    def catch_up(self) -> bool:
        """Takes in the text of new tokens; true if a stop string ends the answer (the text is cut there)."""
        tokens = self.request.output_token_ids
        if self._tokenizer is None or self.stop_string is not None:
            return False
        if self._stream is None:
            tail = self.request.prompt[-PRIMING_TOKENS:].tolist()
            self._stream = self._tokenizer.stream(tail, self.params.skip_special_tokens)
        while self._read < len(tokens):
            token = tokens[self._read]
            self._read += 1
            if self._ends_with(token):
                break
            piece = self._stream.add(token)
            self.text += piece
            if piece and self._read > self.params.min_tokens and self._cut_at_stop(len(piece)):
                return True
        return False

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
        # Of several tokens that came at once, those after the stop string are not part of the answer.
        del self.request.output_token_ids[self._read :]
        if self.logprobs is not None:
            del self.logprobs[self._read :]
        at, self.stop_string = min(found, key=lambda pair: pair[0])
        self.text = self.text[: at + len(self.stop_string) * self.params.include_stop_str_in_output]
        return True

    def add_logprobs(self, token: int, row: int, logprobs: Any) -> None:
        """Takes in a token's log probabilities from a step's (sampler.Logprobs of NumPy arrays)."""
        assert self.logprobs is not None and self.params.logprobs is not None
        value = float(logprobs.token[row])
        entry = {token: self._logprob(token, value, int(logprobs.rank[row]))}
        for rank in range(min(self.params.logprobs, logprobs.top_ids.shape[1])):
            top = int(logprobs.top_ids[row, rank])
            if top not in entry:
                entry[top] = self._logprob(top, float(logprobs.top[row, rank]), rank + 1)
        self.logprobs.append(entry)

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self._tokenizer.token_text(token) if self._tokenizer else None)

    def output(self, holding_back: bool = False) -> CompletionOutput:
        """The answer so far. `holding_back` leaves out an end of the text that may turn out to begin a stop string."""
        self.catch_up()
        request = self.request
        finished = request.finish_reason is not None
        text = self.text
        if holding_back and not finished and not self.params.include_stop_str_in_output:
            hidden = max((len(stop) for stop in self.params.stop or ()), default=1) - 1
            text = text[: max(len(text) - hidden, 0)]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(request.output_token_ids),
            cumulative_logprob=self._cumulative_logprob(),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=request.finish_reason.value if request.finish_reason is not None else None,
            stop_reason=self._stop_reason(),
        )

    def _cumulative_logprob(self) -> float | None:
        if self.logprobs is None:
            return None
        tokens = self.request.output_token_ids
        return sum(entry[token].logprob for token, entry in zip(tokens, self.logprobs, strict=True))

    def _stop_reason(self) -> int | str | None:
        if self.stop_string is not None:
            return self.stop_string
        reason = self.request.stop_reason
        return None if reason == self._eos_token_id else reason
