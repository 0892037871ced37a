"""SamplingParams: how to sample one request, with the names, defaults and checks of vLLM 0.4 to 0.33."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxllm.validation import check_known

MIN_TEMPERATURE = 1e-2  # lower positive temperatures are raised to it: below, float32 overflows
GREEDY_TEMPERATURE = 1e-5  # below this one, sampling is greedy
MAX_LOGIT_BIAS = 100.0  # biases beyond are lowered to it, as in OpenAI's API
MAX_LOGPROB_TOKEN_IDS = 128  # of one request

_REFUSED: dict[str, tuple[Any, str]] = {
    "watermarking": (None, "texts are not watermarked"),
    "flat_logprobs": (False, "log probabilities come as one dict a token"),
    "stream_interval": (None, "a stream yields every step's tokens; take every n-th output instead"),
    "routed_experts_prompt_start": (0, "the experts that tokens were routed to are not returned"),
    "trace_decode_token_ids": (None, "tokens are sampled, not replayed"),
    "guided_decoding_backend": (None, "the grammar backend is not chosen by the request"),
}
"""vLLM's fields that are not honoured: the default, which is accepted, and why any other value is refused."""

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
"""Older names of StructuredOutputsParams' fields."""

STRUCTURE_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""StructuredOutputsParams' fields of which exactly one is given."""


class RequestOutputKind(Enum):
    """What the outputs of a streamed request hold."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the output before
    FINAL_ONLY = 2  # there is one output, when the request has finished


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What the answer's text must be: exactly one of json, regex, choice, grammar, json_object and structural_tag.

    Attributes:
      json: a JSON schema, as text, dict or pydantic model.
      regex: a regular expression, of the whole answer, without look-around and back references.
      choice: one of these strings.
      grammar: a grammar in Lark's notation, or in EBNF as llama.cpp and xgrammar write it (`root ::= ...`).
      json_object: any JSON object.
      structural_tag: JSON between tags in free text: {"triggers": [text, ...], "structures": [{"begin": text,
        "schema": JSON schema, "end": text}, ...]}, as text.
      disable_any_whitespace: compact JSON.
      disable_additional_properties: objects with `properties` have no others, unless the schema says that they may.
      whitespace_pattern: a regular expression of what may stand between JSON's tokens; None: any white space.

    Raises: ValueError if none or several are given.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        if hasattr(self.json, "model_json_schema"):  # a pydantic model
            self.json = self.json.model_json_schema()
        if len(self._given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(STRUCTURE_KINDS)}, got {self._given}"
            )

    @property
    def _given(self) -> list[str]:
        return [name for name in STRUCTURE_KINDS if getattr(self, name) not in (None, False)]

    @property
    def kind(self) -> str:
        """The one of STRUCTURE_KINDS that is given."""
        return self._given[0]


@dataclass(kw_only=True)
class GuidedDecodingParams(StructuredOutputsParams):
    """StructuredOutputsParams under its name of vLLM 0.6 to 0.10, for `SamplingParams(guided_decoding=)`.

    Attributes:
      backend: must be None, for there is one; `disable_fallback` is about others, of which there are none.
    """

    backend: str | None = None
    disable_fallback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend is not None:
            raise ValueError(
                f"backend must be None, got {self.backend!r}: the grammar backend is not chosen by the request"
            )

    @classmethod
    def from_optional(cls, **fields: Any) -> GuidedDecodingParams | None:
        """None if nothing says what the answer must be."""
        return cls(**fields) if any(fields.get(name) is not None for name in STRUCTURE_KINDS) else None


@dataclass(kw_only=True)
class RepetitionDetectionParams:
    """Ends an answer whose last tokens are one pattern `min_count` times over.

    Attributes:
      max_pattern_size: longest pattern looked for, in tokens; 0: none is.
      min_pattern_size: shortest one; 0 means 1.
      min_count: so often it must stand there, at least 2.

    Raises: ValueError naming the field, the value and what is allowed.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        _check_integer("max_pattern_size", self.max_pattern_size, 0)
        _check_integer("min_pattern_size", self.min_pattern_size, 0)
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"min_pattern_size={self.min_pattern_size} must not exceed max_pattern_size={self.max_pattern_size}"
            )
        _check_integer("min_count", self.min_count, 2 if self.max_pattern_size else 0)

    def found_in(self, tokens: Sequence[int]) -> bool:
        """Whether the last tokens are a pattern that stands there `min_count` times."""
        for size in range(max(self.min_pattern_size, 1), self.max_pattern_size + 1):
            repeated = size * (self.min_count - 1)  # tokens that must equal the one `size` before them
            if repeated + size > len(tokens):
                return False
            if all(tokens[-i] == tokens[-i - size] for i in range(1, repeated + 1)):
                return True
        return False


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of a request.

    Attributes:
      n: how many answers to one prompt.
      best_of: so many are generated, and the `n` with the highest cumulative log probability returned; None: n.
      presence_penalty: taken from the logit of each token that is in the answer; in [-2, 2].
      frequency_penalty: the same, times how often it is there; in [-2, 2].
      repetition_penalty: divides positive logits of tokens that are in prompt or answer, and multiplies negative ones
        (Keskar et al. 2019); above 0, 1 is off.
      temperature: 0 is greedy; 1 samples from the model's own distribution.
      top_p: sample from the smallest set of tokens that has this probability; in (0, 1].
      top_k: sample from the k likeliest tokens; 0 or -1: from all.
      min_p: drop tokens less likely than this fraction of the likeliest; in [0, 1].
      seed: equal seeds give equal answers, whatever else is in the batch; None or -1: a fresh one.
      use_beam_search: search for the answers with the highest scores, with best_of (or n) beams; see
        jaxllm.beam_search, also for `length_penalty` and `early_stopping`. Log probabilities are then those after bias,
        penalties and masks.
      stop: strings that end the answer.
      stop_token_ids: tokens that end the answer.
      bad_words: words that are not generated, neither at the beginning nor inside of the text.
      allowed_token_ids: only these tokens are sampled.
      logit_bias: token id -> what is added to its logit, in [-100, 100].
      logits_processors: functions (output token ids, logits) -> logits, or (prompt token ids, output token ids, logits)
        -> logits, called in turn before anything else is done to the logits, a NumPy array float32 [V] that they may
        change. They run on the host: such a request is sampled one token at a time.
      ignore_eos: go on after the end-of-sequence token.
      include_stop_str_in_output: keep the stop string (or stop token's text) in the answer's text.
      max_tokens: at most this many new tokens; None: as many as max_model_len allows.
      min_tokens: before this many new tokens, no end-of-sequence or stop token is sampled and no stop string counts.
      logprobs: return this many top log probabilities per token, and the sampled token's own; -1: of the whole
        vocabulary; None: none.
      logprob_token_ids: return the log probabilities of these tokens instead of the top ones.
      prompt_logprobs: the same as `logprobs`, for the prompt's tokens.
      prompt_logprob_token_ids, prompt_logprob_start: return `RequestOutput.prompt_token_id_logprobs`, the log
        probabilities of these tokens after each prompt token from this position on, but the last.
      detokenize: turn the answer into text.
      skip_special_tokens: leave special tokens out of the text.
      spaces_between_special_tokens: as the tokenizer has it; False: none between special tokens in a row.
      truncate_prompt_tokens: use only the last so many tokens of the prompt; -1: as many as the engine takes.
      structured_outputs: what the answer's text must be: a StructuredOutputsParams or a dict of its fields.
      output_kind: what a streamed request's outputs hold.
      extra_args: handed to the scheduling policy as `Request.data`.
      skip_reading_prefix_cache: compute the whole prompt; None: if prompt log probabilities are asked for.
      thinking_token_budget: after so many tokens between the engine's reasoning markers the closing one is forced; None
        or -1: no bound.
      repetition_detection: ends an answer that repeats itself: a RepetitionDetectionParams or a dict of its fields.

    Raises: ValueError naming the field, the value and what is allowed; TypeError for an unknown field.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[Callable[..., Any]] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_start: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_counts()
        self._check_distribution()
        self._check_lists()
        self._check_logprobs()
        self._check_kinds()
        if 0 < self.temperature < GREEDY_TEMPERATURE:
            self.temperature = 0.0
        elif 0 < self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        if self.use_beam_search:
            self._check_beam_search()
        else:
            self._check_no_beam_search()
        self._check_prefix_cache()

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

    @property
    def num_sequences(self) -> int:
        """How many answers are generated, of which the best `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def skips_prefix_cache(self) -> bool:
        """Whether the whole prompt must be computed: cached tokens have no logits."""
        if self.skip_reading_prefix_cache is None:
            return self.prompt_logprobs is not None or self.prompt_logprob_token_ids is not None
        return self.skip_reading_prefix_cache

    def _normalize(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or ()))
        self.bad_words = list(dict.fromkeys(self.bad_words or ()))
        self.logits_processors = list(self.logits_processors or ())
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.seed = None if self.seed == -1 else self.seed
        self.thinking_token_budget = None if self.thinking_token_budget == -1 else self.thinking_token_budget
        self.logprobs = 1 if self.logprobs is True else self.logprobs
        self.prompt_logprobs = 1 if self.prompt_logprobs is True else self.prompt_logprobs
        self.logit_bias = None if self.logit_bias is None else _checked_bias(self.logit_bias)
        self.structured_outputs = _made("structured_outputs", self.structured_outputs, StructuredOutputsParams)
        self.repetition_detection = _made("repetition_detection", self.repetition_detection, RepetitionDetectionParams)

    def _check_counts(self) -> None:
        _check_integer("n", self.n, 1)
        if self.best_of is not None:
            _check_integer("best_of", self.best_of, self.n, f"an integer of at least n={self.n}")
            if self.best_of != self.n and self.output_kind is RequestOutputKind.DELTA:
                raise ValueError(f"best_of={self.best_of} must equal n={self.n} with output_kind=DELTA")
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63))
        if self.thinking_token_budget is not None:
            _check_integer("thinking_token_budget", self.thinking_token_budget, 0, "an integer of at least 0, or -1")
        if self.truncate_prompt_tokens not in (None, -1):
            _check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, "an integer of at least 1, or -1")

    def _check_distribution(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "in [-2, 2]", lambda x: -2 <= x <= 2)
        positive = "a finite number above 0"
        _check_number("repetition_penalty", self.repetition_penalty, positive, lambda x: 0 < x < math.inf)
        _check_number("temperature", self.temperature, "in [0, 2]", lambda x: 0 <= x <= 2)
        _check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        _check_integer("top_k", self.top_k, 0, "0 or -1 (off), or an integer of at least 1")

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text:
                    raise ValueError(f"{name} must hold non-empty strings, got {text!r}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} needs detokenize=True: stop strings are looked for in the text")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "prompt_logprob_token_ids"):
            for token in getattr(self, name) or ():
                _check_integer(name, token, 0)
        for name in ("allowed_token_ids", "prompt_logprob_token_ids"):
            if getattr(self, name) is not None and not len(getattr(self, name)):
                raise ValueError(f"{name} must not be empty; None stands for no restriction")
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise ValueError(f"logits_processors must hold functions, got {processor!r}")

    def _check_logprobs(self) -> None:
        allowed = "an integer of at least 0, or -1 (the whole vocabulary)"
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) not in (None, -1):
                _check_integer(name, getattr(self, name), 0, allowed)
        for name in ("logprob_token_ids", "prompt_logprob_token_ids"):
            count = len(getattr(self, name) or ())
            if count > MAX_LOGPROB_TOKEN_IDS:
                raise ValueError(f"{name} must have at most {MAX_LOGPROB_TOKEN_IDS} tokens, got {count}")
        wanted = self.prompt_logprob_token_ids or ()
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"prompt_logprob_token_ids must not hold a token twice, got {wanted!r}")
        if self.logprob_token_ids and self.logprobs not in (None, len(self.logprob_token_ids)):
            raise ValueError(
                f"logprobs={self.logprobs} must be None or the number of logprob_token_ids, "
                f"which is {len(self.logprob_token_ids)}"
            )
        if self.prompt_logprob_start is not None:
            _check_integer("prompt_logprob_start", self.prompt_logprob_start, 0)

    def _check_kinds(self) -> None:
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        if not isinstance(self.extra_args, dict | None):
            raise ValueError(f"extra_args must be a dict, got {self.extra_args!r}")
        for one in dataclasses.fields(self):
            allowed = {"bool": (bool,), "bool | None": (bool, type(None))}.get(str(one.type))
            if allowed is not None and not isinstance(getattr(self, one.name), allowed):
                raise ValueError(f"{one.name} must be True or False, got {getattr(self, one.name)!r}")

    def _check_beam_search(self) -> None:
        if self.num_sequences == 1:
            raise ValueError(f"best_of must be above 1 with use_beam_search, got {self.num_sequences}")
        for name, only in (("temperature", 0), ("top_p", 1), ("top_k", 0)):
            if getattr(self, name) != only:
                raise ValueError(f"{name} must be {only} with use_beam_search, got {getattr(self, name)!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        _check_length_penalty(self.length_penalty)
        if self.output_kind is RequestOutputKind.DELTA:
            raise ValueError("output_kind must not be DELTA with use_beam_search: beams replace one another")

    def _check_prefix_cache(self) -> None:
        scored = [name for name in ("prompt_logprobs", "prompt_logprob_token_ids") if getattr(self, name) is not None]
        if scored and self.skip_reading_prefix_cache is False:
            raise ValueError(
                f"skip_reading_prefix_cache must be None or True with {scored[0]}, got False: cached tokens have no "
                f"logits"
            )

    def _check_no_beam_search(self) -> None:
        if self.early_stopping is not False:
            raise ValueError(f"early_stopping must be False without use_beam_search, got {self.early_stopping!r}")
        if self.length_penalty != 1.0:
            raise ValueError(f"length_penalty must be 1.0 without use_beam_search, got {self.length_penalty!r}")
        if self.greedy and self.num_sequences > 1:
            name = "n" if self.n > 1 else "best_of"
            raise ValueError(f"{name} must be 1 with greedy sampling (temperature=0), got {getattr(self, name)}")


@dataclass(kw_only=True)
class BeamSearchParams:
    """Parameters of LLM.beam_search.

    Attributes:
      beam_width: beams, and answers returned.
      max_tokens: the answers' longest length in new tokens.
      ignore_eos: go on after the end-of-sequence token.
      temperature: the log probabilities that are added up are those of the distribution at it; 0 means 1.
      length_penalty: an answer's score is its cumulative log probability / (new tokens ** length_penalty); from -50
        to 50.
      include_stop_str_in_output: keep the end-of-sequence token's text in the answer's text.
      skip_special_tokens: leave special tokens out of the text.
      structured_outputs, allowed_token_ids: as in SamplingParams.

    Raises: ValueError naming the field, the value and what is allowed; TypeError for an unknown field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    watermarking: None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check_integer("beam_width", self.beam_width, 1)
        _check_length_penalty(self.length_penalty)
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """What the engine is asked for: all answers that could score better are looked for ("never")."""
        params = SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            include_stop_str_in_output=self.include_stop_str_in_output,
            structured_outputs=self.structured_outputs,
            skip_special_tokens=self.skip_special_tokens,
            watermarking=self.watermarking,
            allowed_token_ids=self.allowed_token_ids,
            logprobs=2 * self.beam_width,
        )
        # Set afterwards, for vLLM 0.4's checks of these fields allow neither a single beam nor a temperature.
        params.use_beam_search, params.n, params.early_stopping = True, self.beam_width, "never"
        params.length_penalty = self.length_penalty
        return params


def _check_integer(name: str, value: Any, minimum: int, allowed: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be {allowed or f'an integer of at least {minimum}'}, got {value!r}")


def _check_number(name: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not ok(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _checked_bias(bias: Any) -> dict[int, float]:
    """Token id -> bias within +-MAX_LOGIT_BIAS; keys may be text, as JSON has them."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must be a dict of token ids and numbers, got {bias!r}")
    checked = {}
    for key, value in bias.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise ValueError(f"logit_bias must have token ids for keys, got {key!r}") from None
        _check_integer("logit_bias", token, 0, "a dict with token ids of at least 0")
        _check_number(f"logit_bias[{key!r}]", value, "a number", lambda x: True)
        checked[token] = min(max(float(value), -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)
    return checked


def _check_length_penalty(value: Any) -> None:
    # Beyond, a long answer's length to that power is no number.
    _check_number("length_penalty", value, "a number from -50 to 50", lambda x: -50 <= x <= 50)


def _made(name: str, value: Any, kind: type) -> Any:
    """`value` as a `kind`: itself, made of a dict of fields, or None."""
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a {kind.__name__} or a dict of its fields, got {value!r}")
    check_known(value, (one.name for one in dataclasses.fields(kind)), kind.__name__)
    return kind(**value)


def _with_current_names(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without what is refused and with today's names; ValueError for a refused value."""
    current: dict[str, Any] = {}
    guided: dict[str, Any] = {}
    decoding = None
    for name, value in fields.items():
        if name in _REFUSED:
            default, reason = _REFUSED[name]
            if value != default:
                raise ValueError(f"{name} must be {default!r}, got {value!r}: {reason}")
        elif name in _GUIDED:
            guided |= {} if value in (None, False) else {_GUIDED[name]: value}
        elif name == "guided_decoding":
            decoding = _made(name, value, GuidedDecodingParams)
        else:
            current[name] = value
    ways = [way for way in (current.get("structured_outputs"), decoding, guided or None) if way is not None]
    if len(ways) > 1:
        raise ValueError(f"structured_outputs and guided_* must not both be given, got {ways!r}")
    if ways:
        current["structured_outputs"] = ways[0]
    return current


def _refuse_unknown(generated_init: Any) -> Any:
    @functools.wraps(generated_init)
    def init(self: SamplingParams, **fields: Any) -> None:
        check_known(fields, known_fields(), "SamplingParams")
        generated_init(self, **_with_current_names(fields))

    return init


def known_fields() -> Iterable[str]:
    """Every name that the constructor knows, refused and older ones included."""
    return [*(one.name for one in dataclasses.fields(SamplingParams)), *_REFUSED, *_GUIDED, "guided_decoding"]


SamplingParams.__init__ = _refuse_unknown(SamplingParams.__init__)  # type: ignore[method-assign]
