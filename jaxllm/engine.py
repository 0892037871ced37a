"""LLMEngine: text in, text out, around the scheduling loop. The only place where tokenizer and scheduler meet.

    add_request -> tokens -> Request -> Scheduler -> plan -> ModelRunner -> tokens -> Sequence -> text -> RequestOutput

It is single-threaded: whoever owns it calls `add_request`, `abort_request` and `step`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.beam_group import BeamGroup, BeamSequence, check_beam_search
from jaxllm.config import EngineConfig
from jaxllm.logprobs import PromptLogprobs
from jaxllm.metrics import EngineMetrics, Metric
from jaxllm.outputs import PoolingRequestOutput, RequestMetrics, RequestOutput
from jaxllm.pooling import PooledTokens, PooledVector, PoolerConfig, PoolingParams, embedding, probabilities
from jaxllm.runner.logprobs import WHOLE_VOCABULARY
from jaxllm.runner.model_runner import ModelRunner, RunnerResult
from jaxllm.runner.pooling import Pooling
from jaxllm.runner.sampler import SamplingSpec
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.sampling_specs import SamplingSpecs
from jaxllm.scheduling import EngineLoop, FinishReason, Request, Scheduler, SchedulerConfig, StepOutput, make_policy
from jaxllm.sequence import Sequence
from jaxllm.sleep import SleepMode
from jaxllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | SequenceOf[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""


@dataclass
class _Group:
    """A request as its caller sees it: one prompt and n sequences, or best_of."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_logprobs: PromptLogprobs
    sequences: list[Sequence]
    streaming: bool
    arrival: float
    finished_time: float | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.request.finish_reason is not None for sequence in self.sequences)

    def output(self) -> RequestOutput:
        first = self.sequences[0].request
        metrics = RequestMetrics(self.arrival, first.first_scheduled_at, first.first_token_at, self.finished_time)
        delta = self.streaming and self.params.output_kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[
                sequence.output(holding_back=self.streaming, delta=delta)
                for sequence in self._best()
                if not (delta and sequence.has_told_its_end)
            ],
            finished=self.finished,
            metrics=metrics,
            prompt_logprobs=self.prompt_logprobs.dicts,
            prompt_token_id_logprobs=self.prompt_logprobs.matrix,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _best(self) -> list[Sequence]:
        """The sequences to return: all, or of best_of the n with the highest cumulative log probability."""
        n = self.params.n
        if n == len(self.sequences):
            return self.sequences
        return sorted(self.sequences, key=lambda sequence: sequence.cumulative_logprob, reverse=True)[:n]


@dataclass
class _PoolingGroup(_Group):
    """A request for a vector of its prompt: one sequence, whose token nobody wants."""

    vector: PooledVector | PooledTokens | None = None
    finish: Callable[[np.ndarray], np.ndarray] | None = None

    def output(self) -> PoolingRequestOutput[Any]:
        reason = self.sequences[0].request.finish_reason
        if reason is not FinishReason.LENGTH:
            return PoolingRequestOutput(self.request_id, None, self.prompt_token_ids, finish_reason=str(reason))
        assert self.vector is not None and self.finish is not None
        return PoolingRequestOutput(self.request_id, self.finish(self.vector.value), self.prompt_token_ids)


def check_request_id(request_id: Any) -> None:
    """Raises TypeError for what cannot name a request."""
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be text, got {request_id!r}")


@dataclass(frozen=True)
class PreparedRequest:
    """A request that has passed every check and can be added."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class PreparedPooling:
    """The same of a request for a vector."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: PoolingParams


class LLMEngine:
    """Continuous batching of text requests on one device.

    Args:
      runner: the device side.
      tokenizer: None to work with token ids alone.
      eos_token_ids: tokens that end an answer unless `ignore_eos`; the first is "the" end of sequence, the others are
        reported as `stop_reason`.
      sampling_defaults: the SamplingParams fields that the model's generation_config.json sets, for callers that give
        none; the engine itself does not look at them.
      reload: reads the weights again, for sleep mode's level 2; None where they came from memory.
      pooler: how hidden states become a vector.
      problem_type: of a classifier, as in its config.json; decides what its probabilities are.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        eos_token_ids: SequenceOf[int] = (),
        sampling_defaults: Mapping[str, Any] | None = None,
        reload: Callable[[], Any] | None = None,
        pooler: PoolerConfig | None = None,
        problem_type: str | None = None,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        # A tokenizer may know tokens that the model does not: these are never sampled.
        vocab_size = runner.network.config.vocab_size
        self.eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self.sampling_defaults = dict(sampling_defaults or {})
        self._pooler, self._problem_type = pooler or PoolerConfig(), problem_type
        self.config: EngineConfig = runner.config
        config = self.config
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=runner.num_pages,
                page_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                enable_prefix_caching=config.enable_prefix_caching,
                enable_chunked_prefill=config.enable_chunked_prefill,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
            ),
            make_policy(config.scheduling_policy),
        )
        self._loop = EngineLoop(
            self.scheduler,
            runner,
            time.monotonic,
            ahead=int(config.async_scheduling),
            # The log probabilities of a whole vocabulary are too much to keep for several steps.
            max_steps=1 if config.max_logprobs == WHOLE_VOCABULARY else config.num_scheduler_steps,
            loop_steps=runner.ladder.loop_steps,
        )
        self._sleep_mode = SleepMode(runner, reload)
        self._metrics = EngineMetrics(self.scheduler)
        self._specs = SamplingSpecs(config, runner.network.config.vocab_size, tokenizer, self.eos_token_ids)
        self._groups: dict[str, _Group | BeamGroup] = {}
        self._of_request: dict[str, tuple[_Group | BeamGroup, Sequence]] = {}
        self._num_watched = 0  # sequences that need a look after every step
        self._counter = itertools.count()

    # --- requests

    def tokenize(self, prompts: SequenceOf[Prompt]) -> list[Prompt]:
        """The prompts, those that are text with their token ids beside it. All at once is faster than one by one."""
        if self.tokenizer is None:
            return list(prompts)
        where = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        tokenized = list(prompts)
        for i, ids in zip(where, self.tokenizer.encode_all([str(prompts[i]) for i in where]), strict=True):
            tokenized[i] = {"prompt": prompts[i], "prompt_token_ids": ids}
        return tokenized

    def prepare(self, prompt: Prompt, params: SamplingParams | Mapping[str, Any] | None = None) -> PreparedRequest:
        """Tokenizes and checks a request without adding it.

        Raises: ValueError or TypeError naming the field, the value and what is allowed.
        """
        self._check_awake()
        if self.num_labels:
            raise ValueError(f"{self.runner.network.config.architecture} classifies and does not generate text")
        params = SamplingParams.of(params)
        text, ids = self._tokens_of(prompt)
        ids = self._truncated(ids, params)
        if params.use_beam_search:
            vocab_size = self.runner.network.config.vocab_size
            check_beam_search(params, len(self._stop_ids(params)), vocab_size, self.config.max_logprobs)
        self._specs.check(params)
        self.scheduler.check_fits(len(ids), self._max_new_tokens(len(ids), params))
        return PreparedRequest(text, ids, params)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | PreparedRequest,
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
        streaming: bool = True,
    ) -> None:
        """Queues a request.

        Args:
          request_id: unique among the unfinished ones.
          priority: for scheduling_policy="priority"; lower is sooner.
          arrival_time: on time.monotonic's clock; None: now.
          streaming: return an output after each of its tokens, as `output_kind` says; else only the final one.

        Raises: ValueError, TypeError or RequestTooLong, before anything of it is queued; RuntimeError in sleep mode.
        """
        self._check_awake()
        self._check_id_and_priority(request_id, priority)
        ready = prompt if isinstance(prompt, PreparedRequest) else self.prepare(prompt, params)
        arrival = time.monotonic() if arrival_time is None else arrival_time
        make_group = self._beam_group if ready.params.use_beam_search else self._group
        group = make_group(request_id, ready, priority, streaming, arrival)
        self._queue(group, arrival)
        self._groups[request_id] = group

    def _check_id_and_priority(self, request_id: str, priority: int) -> None:
        check_request_id(request_id)
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is already in use")
        if not isinstance(priority, int | np.integer):
            raise TypeError(f"priority must be an integer, got {priority!r}")

    def _queue(self, group: _Group | BeamGroup, now: float) -> None:
        """Hands the requests of the group's sequences to the scheduler, all of them or none."""
        for i, sequence in enumerate(group.sequences):
            try:
                self.scheduler.add(sequence.request, now)
            except BaseException:  # a policy's own code is asked
                for queued in group.sequences[:i]:
                    self.scheduler.finish(queued.request, FinishReason.ABORT, None, now)
                self._forget_requests(group)
                raise
            self._of_request[sequence.request.id] = (group, sequence)
            self._num_watched += self._is_watched(group, sequence)

    def prepare_pooling(self, prompt: Prompt, params: PoolingParams) -> PreparedPooling:
        """Tokenizes and checks a request for embeddings or classes; `params.task` says which.

        Raises: ValueError or TypeError naming the field, the value and what is allowed.
        """
        self._check_awake()
        text, ids = self._tokens_of(prompt)
        ids = self._truncated(ids, params)
        config = self.runner.network.config
        if params.task == "classify" and not self.num_labels:
            raise ValueError(f"{config.architecture} has no classes: it is no sequence classifier")
        if params.dimensions is not None and params.dimensions > config.hidden_size:
            raise ValueError(f"dimensions={params.dimensions} must be at most the model's {config.hidden_size}")
        self.scheduler.check_fits(len(ids), 1)
        return PreparedPooling(text, ids, params)

    def add_pooling_request(self, request_id: str, ready: PreparedPooling, *, priority: int = 0) -> None:
        """Queues a request for a vector; `step` returns its PoolingRequestOutput, of a NumPy array f32[...].

        Raises: ValueError if the id is in use; TypeError for an id or a priority that is none; RuntimeError in sleep
          mode.
        """
        self._check_awake()
        self._check_id_and_priority(request_id, priority)
        ids, arrival = ready.prompt_token_ids, time.monotonic()
        of_task: dict[str | None, Pooling] = {"classify": "last", "token_embed": "all"}
        pooling = of_task.get(ready.params.task, self._pooler.pooling)
        request = Request(
            id=f"{request_id}/0",
            prompt=np.array(ids, np.int32),
            max_new_tokens=1,
            priority=priority,
            arrival=arrival,
            cache_salt=self._cache_salt(len(ids)),
            skip_reading_prefix_cache=True,  # cached tokens have no hidden states
            stepwise=True,  # a burst of decode steps returns no hidden states either
            sampling=SamplingSpec(pooling=pooling),
        )
        self.scheduler.add(request, arrival)
        unused = SamplingParams(max_tokens=1, detokenize=False)
        sequence = Sequence(request, 0, unused, None, None)
        logprobs = PromptLogprobs(unused, ids, lambda token: None)
        vector = PooledTokens() if pooling == "all" else PooledVector(pooling, len(ids))
        group = _PoolingGroup(
            request_id, ready.prompt, ids, unused, logprobs, [sequence], False, arrival,
            vector=vector, finish=lambda values: self._finish_vector(values, ready.params),
        )  # fmt: skip
        self._groups[request_id] = group
        self._of_request[request.id] = (group, sequence)

    @property
    def num_labels(self) -> int:
        """Of a sequence classifier; 0 for a model that generates."""
        return self.runner.network.config.num_labels

    @property
    def pooling_task(self) -> str:
        """What the model's vectors are for, where nobody says."""
        return "classify" if self.num_labels else "embed"

    def _finish_vector(self, vector: np.ndarray, params: PoolingParams) -> np.ndarray:
        if params.task == "classify":
            return probabilities(self.runner.classify(vector), params, self._pooler, self._problem_type)
        return embedding(vector, params, self._pooler)

    def abort_request(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """Ends requests; returns their last outputs, with finish_reason "abort". Unknown ids are ignored."""
        wanted = dict.fromkeys([request_ids] if isinstance(request_ids, str) else request_ids)
        aborted = [self._groups[one] for one in wanted if one in self._groups]
        for group in aborted:
            self._end_all(group, FinishReason.ABORT)
        return [self._hand_out(group) for group in aborted]

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups)

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._groups)

    # --- the whole engine

    def get_metrics(self) -> list[Metric]:
        """What the engine has done so far and holds now, under vLLM's names."""
        unfinished = ([sequence.request for sequence in group.sequences] for group in self._groups.values())
        return self._metrics.read(unfinished)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes. Running requests are not disturbed."""
        self.scheduler.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Frees the device's memory: see jaxllm.sleep.SleepMode. Raises RuntimeError while requests are unfinished."""
        if self.has_unfinished_requests():
            raise RuntimeError(f"the engine has {self.num_unfinished_requests} unfinished requests: it cannot sleep")
        self.drain()
        self._sleep_mode.sleep(level)
        self.scheduler.reset_prefix_cache()

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Restores what `sleep` has freed, "weights" and "kv_cache"; None: both."""
        self._sleep_mode.wake_up(tags)

    @property
    def is_sleeping(self) -> bool:
        return bool(self._sleep_mode.missing)

    def _check_awake(self) -> None:
        if self.is_sleeping:
            raise RuntimeError(
                f"the engine is asleep, without its {' and '.join(sorted(self._sleep_mode.missing))}: call wake_up() "
                f"before requests"
            )

    # --- steps

    def step(self) -> list[RequestOutput]:
        """Runs one step; the outputs of requests that got a token they stream, or that finished.

        If the step itself fails, the requests that were running end with finish_reason "error"; the engine goes on.
        """
        try:
            taken = self._loop.step()
        except Exception:
            logger.exception("a step failed; its requests end with finish_reason 'error'")
            return self._fail_residents()
        return [] if taken is None else self._outputs(*taken)

    def drain(self) -> None:
        """Waits for steps in flight whose requests are all gone."""
        while not self._loop.idle:
            self.step()

    def _outputs(self, output: StepOutput, result: RunnerResult) -> list[RequestOutput]:
        touched: dict[str, _Group | BeamGroup] = {}
        for request, first, logprobs in result.prompt_scores or ():
            if (found := self._of_request.get(request.id)) and found[1].request is request:
                found[0].prompt_logprobs.take(first, logprobs)
        for request, start, part in result.pooled or ():
            if (found := self._of_request.get(request.id)) and found[1].request is request:
                found[0].vector.take(start, part)
        failed = {request.id for request in result.failed}
        if self._num_watched:
            for request, tokens, row in zip(output.requests, output.tokens, output.rows.tolist(), strict=True):
                group, sequence = self._of_request[request.id]
                if request.id not in failed:  # or its token is none
                    self._watch(sequence, tokens, row, result)
                if isinstance(group, _Group) and (group.streaming or group.finished):
                    touched[group.request_id] = group
        ended = [*output.finished, *self._end_failed(result)]
        for group in {id(group): group for group, _ in (self._of_request[request.id] for request in ended)}.values():
            advanced = isinstance(group, BeamGroup) and self._advance(group)
            if group.finished or (advanced and group.streaming):
                touched[group.request_id] = group
        return [self._hand_out(group) for group in touched.values()]

    def _advance(self, group: BeamGroup) -> bool:
        """Takes a beam search a token further if all of its beams are there; whether it did."""
        failed = any(sequence.request.finish_reason is FinishReason.ERROR for sequence in group.sequences)
        if not failed and not group.step_done:
            return False
        self._forget_requests(group)
        if failed:
            self._end_all(group, FinishReason.ERROR)
            return True
        try:
            group.advance()
            if not group.finished:
                self._queue_forks(group)
        except Exception:
            logger.exception("a beam search failed; it ends with finish_reason 'error'")
            self._end_all(group, FinishReason.ERROR)
        return True

    def _queue_forks(self, group: BeamGroup) -> None:
        for sequence in group.sequences:
            sequence.request.sampling = sequence.request.sampling.fork()
            sequence.request.skip_reading_prefix_cache = bool(group.params.skip_reading_prefix_cache)
        self._queue(group, time.monotonic())

    def _end_failed(self, result: RunnerResult) -> list[Request]:
        """Ends the requests whose sampling failed on the host: finish_reason "error", and without this token."""
        failed = [request for request in result.failed if request.id in self._of_request]
        for request in failed:
            del request.output_token_ids[-1:]
            self.scheduler.finish(request, FinishReason.ERROR, None, time.monotonic())
            request.finish_reason = FinishReason.ERROR  # also if this token was its last
        return failed

    def _watch(self, sequence: Sequence, tokens: list[int], row: int, result: RunnerResult) -> None:
        if sequence.takes_logprobs:
            for token, logprobs in zip(tokens, result.logprobs, strict=False):
                sequence.add_logprobs(token, row, logprobs)
        if sequence.watches and (reason := sequence.catch_up()):
            request = sequence.request
            if request.finish_reason is None:
                self.scheduler.finish(request, reason, None, time.monotonic())
            else:
                request.finish_reason = reason  # it also reached its length, or a stop token, just now

    def _hand_out(self, group: _Group | BeamGroup) -> RequestOutput:
        if group.finished:
            group.finished_time = time.monotonic()
            self._forget(group)
        return group.output()

    def _fail_residents(self) -> list[RequestOutput]:
        self._loop.drop_in_flight()
        failed = {self._of_request[request.id][0].request_id for request in self.scheduler.residents.in_order()}
        for request_id in failed:
            group = self._groups[request_id]
            self._end_all(group, FinishReason.ERROR)
        self.scheduler.reset_prefix_cache()
        self.runner.reset()
        return [self._hand_out(self._groups[request_id]) for request_id in failed]

    def _end_all(self, group: _Group | BeamGroup, reason: FinishReason) -> None:
        for sequence in group.sequences:
            self.scheduler.finish(sequence.request, reason, None, time.monotonic())
        if isinstance(group, BeamGroup):
            group.end(reason)

    def _forget(self, group: _Group | BeamGroup) -> None:
        del self._groups[group.request_id]
        self._metrics.take([sequence.request for sequence in group.sequences], time.monotonic())
        self._forget_requests(group)

    def _forget_requests(self, group: _Group | BeamGroup) -> None:
        for sequence in group.sequences:
            if self._of_request.pop(sequence.request.id, None) is not None:  # a beam search's answers have no request
                self._num_watched -= self._is_watched(group, sequence)

    @staticmethod
    def _is_watched(group: _Group | BeamGroup, sequence: Sequence) -> bool:
        return group.streaming or sequence.watches or sequence.takes_logprobs

    # --- from a prompt and parameters to the scheduler's Request

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if prompt.get("multi_modal_data") is not None:
                architecture = self.runner.network.config.architecture
                raise ValueError(
                    f"multi_modal_data has {sorted(prompt['multi_modal_data'])}, but {architecture} takes text alone"
                )
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "multi_modal_data"}
            if unknown or not prompt:
                raise ValueError(
                    f'a prompt dict holds "prompt" (text) or "prompt_token_ids" (ids), got the keys {sorted(prompt)}'
                )
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            return (text, self._checked_ids(ids)) if ids is not None else self._tokens_of(text)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "prompt is text, but the engine has no tokenizer (skip_tokenizer_init): pass token ids"
                )
            return prompt, self.tokenizer.encode(prompt)
        return None, self._checked_ids(prompt)

    def _checked_ids(self, ids: Any) -> list[int]:
        if isinstance(ids, np.ndarray) and ids.ndim == 1:
            ids = ids.tolist()
        if not isinstance(ids, SequenceOf) or not all(type(token) is int for token in ids):
            raise TypeError(f"prompt must be text, a sequence of int token ids or a dict of either, got {ids!r:.100}")
        size = self.runner.network.config.vocab_size
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise ValueError(
                    f"prompt_token_ids[{position}]={token} is out of range: the vocabulary has ids 0 to {size - 1}"
                )
        return list(ids)

    def _truncated(self, ids: list[int], params: SamplingParams | PoolingParams) -> list[int]:
        """The prompt's last tokens, as truncate_prompt_tokens says; -1 leaves one of max_model_len for the answer."""
        kept = params.truncate_prompt_tokens
        return ids if kept is None else ids[-(self.config.max_model_len - 1 if kept == -1 else kept) :]

    def _group(self, request_id: str, ready: PreparedRequest, priority: int, streaming: bool, arrival: float) -> _Group:
        params, count = ready.params, ready.params.num_sequences
        requests = [self._request(ready, f"{request_id}/{i}", i, priority, arrival) for i in range(count)]
        sequences = [Sequence(request, i, params, self.tokenizer, self._eos) for i, request in enumerate(requests)]
        streaming = streaming and params.output_kind is not RequestOutputKind.FINAL_ONLY
        logprobs = self._prompt_logprobs(ready)
        return _Group(request_id, ready.prompt, ready.prompt_token_ids, params, logprobs, sequences, streaming, arrival)

    def _beam_group(
        self, request_id: str, ready: PreparedRequest, priority: int, streaming: bool, arrival: float
    ) -> BeamGroup:
        params, prompt = ready.params, ready.prompt_token_ids
        request = self._request(ready, f"{request_id}/0", 0, priority, arrival)
        room = self.config.max_model_len - len(prompt)
        first = BeamSequence(request, 0, params, self.tokenizer, self._eos)
        group = BeamGroup(
            request_id=request_id,
            prompt=ready.prompt,
            prompt_token_ids=prompt,
            params=params,
            prompt_logprobs=self._prompt_logprobs(ready),
            sequences=[first],
            streaming=streaming and params.output_kind is not RequestOutputKind.FINAL_ONLY,
            arrival=arrival,
            max_tokens=min(request.max_new_tokens, room),
            stop_ids=request.stop_token_ids,
        )
        request.max_new_tokens, request.stop_token_ids = 1, frozenset()  # its token is only a candidate
        return group

    @property
    def _eos(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def _prompt_logprobs(self, ready: PreparedRequest) -> PromptLogprobs:
        tokenizer = self.tokenizer if ready.params.detokenize else None
        text_of = tokenizer.token_text if tokenizer is not None else lambda token: None
        return PromptLogprobs(ready.params, ready.prompt_token_ids, text_of)

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids or ()) | frozenset(() if params.ignore_eos else self.eos_token_ids)

    def _max_new_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        return params.max_tokens if params.max_tokens is not None else self.config.max_model_len - prompt_len

    def _request(self, ready: PreparedRequest, name: str, index: int, priority: int, arrival: float) -> Request:
        params, stop_ids, prompt = ready.params, self._stop_ids(ready.params), ready.prompt_token_ids
        spec = self._specs.make(params, prompt, index, self._seed(params, index), stop_ids)
        # The other answers may read what the first has computed, unless the caller said that nothing shall be read.
        skip_cache = params.skips_prefix_cache and (index == 0 or bool(params.skip_reading_prefix_cache))
        return Request(
            id=name,
            prompt=np.array(prompt, np.int32),
            max_new_tokens=self._max_new_tokens(len(prompt), params),
            stop_token_ids=stop_ids,
            min_new_tokens=params.min_tokens,
            priority=priority,
            arrival=arrival,
            cache_salt=self._cache_salt(len(prompt)),
            skip_reading_prefix_cache=skip_cache,
            stepwise=spec.stepwise,
            sampling=spec,
            data=dict(params.extra_args or {}),
        )

    def _cache_salt(self, prompt_len: int) -> str:
        """Keeps prompts apart whose KV differs although they begin alike (dynamic rope)."""
        config = self.runner.network.config
        return f"prompt of {prompt_len}" if config.kv_depends_on_prompt_len(prompt_len) else ""

    def _seed(self, params: SamplingParams, index: int) -> int:
        """The request's own seed, else one of the engine's; each of n answers has its own."""
        if params.seed is not None:
            return params.seed + index
        state = np.random.SeedSequence((self.config.seed, next(self._counter))).generate_state(1, np.uint64)
        return int(state[0])
