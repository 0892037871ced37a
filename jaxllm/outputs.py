"""What a request returns, with vLLM's names and fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar


@dataclass
class Logprob:
    """The log probability (natural logarithm) of one token.

    Attributes:
      logprob: under the model's own distribution, before temperature and filters; of a beam search, after bias,
        penalties and masks.
      rank: 1 for the likeliest token of the vocabulary; None for one that was asked for by its id.
      decoded_token: the token's text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
      index: which of the request's n answers.
      text: the answer so far, never ending in half a character.
      token_ids: its tokens, a stop token included.
      cumulative_logprob: the sum over its tokens; None if nothing needed log probabilities: neither `logprobs` or
        `logprob_token_ids`, nor best_of above n, nor a beam search.
      logprobs: per token, {token id: Logprob}; None if not asked for.
      finish_reason: "stop", "length", "abort", "error" or "repetition"; None while unfinished.
      stop_reason: the stop string or stop token id that ended it, or "repetition_detected"; None for the
        end-of-sequence token or no stop.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class BeamSearchSequence:
    """One answer of LLM.beam_search.

    Attributes:
      tokens: the prompt's tokens and the answer's.
      logprobs: per token of the answer, {token id: Logprob}: the likeliest ones of its beam at that step.
      cum_logprob: the sum over the answer's tokens.
      text: the text of `tokens`; None without a tokenizer.
      finish_reason, stop_reason: as in CompletionOutput.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None


@dataclass
class BeamSearchOutput:
    """A prompt's answers, the one with the highest score first."""

    sequences: list[BeamSearchSequence]


@dataclass
class RequestMetrics:
    """Times in seconds on the engine's monotonic clock; None for what has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass
class RequestOutput:
    """A prompt and its answers so far.

    Attributes:
      request_id: given by the caller or counted.
      prompt: its text; None if it came as token ids.
      prompt_token_ids: its tokens.
      outputs: n answers; of best_of ones the best, by cumulative log probability.
      finished: whether all of them are complete.
      metrics: when what happened.
      prompt_logprobs: per prompt token, {token id: Logprob}, None for the first; None if not asked for.
      prompt_token_id_logprobs: f32[rows, K] NumPy array: the log probabilities of `prompt_logprob_token_ids` after each
        prompt position but the last; NaN where they are not computed yet; None if not asked for.
      num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_token_id_logprobs: Any = None
    lora_request: None = None
    num_cached_tokens: int = 0


@dataclass
class EmbeddingOutput:
    """A prompt's embedding."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """The probability of each class."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass
class ScoringOutput:
    """How well two texts go together: the cosine of their embeddings, or what a reranker says of the pair."""

    score: float


@dataclass
class PoolingOutput:
    """What was made of a prompt: data is a NumPy array, f32[D] of an embedding, f32[num_labels] of classes, f32[T, D]
    of each token's embedding; None if the request was aborted or failed."""

    data: Any

    @property
    def embedding(self) -> list[float]:
        """The same as a list, as vLLM 0.4 has it."""
        return self.data.tolist()


OutputT = TypeVar("OutputT")


@dataclass
class PoolingRequestOutput(Generic[OutputT]):
    """A prompt and the vector that was made of it.

    Attributes:
      request_id, prompt_token_ids, finished: as in RequestOutput.
      outputs: what was asked for.
      finish_reason: "stop", or "abort" or "error", when `outputs` means nothing.
    """

    request_id: str
    outputs: OutputT
    prompt_token_ids: list[int]
    finished: bool = True
    finish_reason: str = "stop"
    num_cached_tokens: int = 0


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """What LLM.embed returns."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """What LLM.classify returns."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """What LLM.score returns."""
