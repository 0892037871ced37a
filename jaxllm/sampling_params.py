"""SamplingParams: how to sample one request, with vLLM's names, defaults and checks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.validation import check_known

MIN_TEMPERATURE = 1e-2  # lower positive temperatures are raised to it: below, float32 overflows
GREEDY_TEMPERATURE = 1e-5  # below this one, sampling is greedy


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of a request.

    Attributes:
      n: how many answers to one prompt.
      temperature: 0 is greedy; 1 samples from the model's own distribution.
      top_p: sample from the smallest set of tokens that has this probability; in (0, 1].
      top_k: sample from the k likeliest tokens; 0 or -1: from all.
      min_p: drop tokens less likely than this fraction of the likeliest; in [0, 1].
      seed: equal seeds give equal answers, whatever else is in the batch; None or -1: a fresh one.
      max_tokens: at most this many new tokens; None: as many as max_model_len allows.
      min_tokens: before this many new tokens, no end-of-sequence or stop token is sampled and no stop string counts.
      stop: strings that end the answer.
      stop_token_ids: tokens that end the answer.
      ignore_eos: go on after the end-of-sequence token.
      include_stop_str_in_output: keep the stop string (or stop token's text) in the answer's text.
      skip_special_tokens: leave special tokens out of the text.
      logprobs: return this many top log probabilities per token, and the sampled token's own; None: none.

    Raises: ValueError naming the field, the value and what is allowed; TypeError for an unknown field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_integer("n", self.n, 1)
        self._check_number("temperature", self.temperature, "in [0, 2]", lambda x: 0 <= x <= 2)
        self._check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        self._check_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_integer("top_k", self.top_k, 0, "0 or -1 (off), or an integer of at least 1")
        if self.max_tokens is not None:
            self._check_integer("max_tokens", self.max_tokens, 1)
        self._check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            self._check_integer("logprobs", self.logprobs, 0)
        if self.seed is not None:
            self._check_integer("seed", self.seed, -(2**63))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            self._check_integer("stop_token_ids", token, 0)
        if 0 < self.temperature < GREEDY_TEMPERATURE:
            self.temperature = 0.0
        elif 0 < self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE

    @classmethod
    def of(cls, params: SamplingParams | dict[str, Any] | None) -> SamplingParams:
        """`params` itself, or one made of a dict of fields; the defaults for None."""
        if isinstance(params, cls):
            return params
        if params is None or isinstance(params, dict):
            return cls(**(params or {}))
        raise TypeError(f"sampling_params must be a SamplingParams or a dict of its fields, got {params!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def _normalize(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids or ())
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.seed = None if self.seed == -1 else self.seed

    @staticmethod
    def _check_integer(name: str, value: Any, minimum: int, allowed: str | None = None) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be {allowed or f'an integer of at least {minimum}'}, got {value!r}")

    @staticmethod
    def _check_number(name: str, value: Any, allowed: str, ok: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or math.isnan(value) or not ok(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _refuse_unknown(generated_init: Any) -> Any:
    @functools.wraps(generated_init)
    def init(self: SamplingParams, **fields: Any) -> None:
        check_known(fields, (one.name for one in dataclasses.fields(SamplingParams)), "SamplingParams")
        generated_init(self, **fields)

    return init


SamplingParams.__init__ = _refuse_unknown(SamplingParams.__init__)  # type: ignore[method-assign]
