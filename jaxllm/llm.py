"""LLM and generate(): offline use. Prompts in, answers out, in the prompts' order."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import closing
from typing import Any, TypeVar

from jaxllm import profiling
from jaxllm.config import EngineConfig
from jaxllm.engine import LLMEngine, PreparedRequest, Prompt
from jaxllm.interrupts import deferred_interrupt
from jaxllm.loading import build_engine
from jaxllm.metrics import Metric
from jaxllm.models.interface import Params
from jaxllm.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from jaxllm.pooling import TASKS, PoolingParams
from jaxllm.progress import Progress, ProgressBar
from jaxllm.prompts import Message, as_conversations, as_prompts, checked_template_options, refuse, with_token_ids
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.sleep import check_sleep_mode
from jaxllm.validation import missing_attribute

ResultT = TypeVar("ResultT")
PoolingLike = PoolingParams | Mapping[str, Any]
ParamsLike = SamplingParams | Mapping[str, Any]


class LLM:
    """A model, ready to generate: vLLM's class of that name.

    Args:
      model: folder or hub id of a Hugging Face checkpoint; a config (the dict of a config.json) together with `params`;
        None for the embedded default model.
      tokenizer: folder, hub id or tokenizer object; None: the model's own.
      params: weights in memory, a nested dict of arrays (see jaxllm.models.interface.Network).
      **engine_args: any field of EngineConfig.

    Raises: TypeError for an unknown field, with the nearest known one; ValueError for a bad value, an unsupported
      architecture, missing or wrong weights, or no tokenizer; FileNotFoundError for a model that is not there;
      RuntimeError if the KV pages do not fit the device.
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, *, params: Any = None, **engine_args: Any) -> None:
        self.config = EngineConfig.create(model=model, tokenizer=tokenizer, **engine_args)
        self.llm_engine: LLMEngine = build_engine(self.config, params)
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[Any]] = {}  # of each request, its call's
        self._enqueued: list[str] = []
        self._enqueued_inbox: deque[Any] = deque()

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> LLM:
        """An LLM of these settings (EngineArgs is another name of EngineConfig)."""
        return cls(**{one.name: getattr(engine_args, one.name) for one in dataclasses.fields(EngineConfig)})

    def __getattr__(self, name: str) -> Any:
        raise missing_attribute(self, name)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None with skip_tokenizer_init."""
        tokenizer = self.llm_engine.tokenizer
        return None if tokenizer is None else tokenizer.hf

    def get_world_size(self) -> int:
        """How many devices the model is spread over: one."""
        return 1

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given none: the defaults, with what the model's generation_config.json sets."""
        return SamplingParams(**self.llm_engine.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt] | None = None,
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
        prompt_token_ids: SequenceOf[int] | SequenceOf[SequenceOf[int]] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        multi_modal_data: None = None,
        *,
        priority: SequenceOf[int] | None = None,
        **refused: None,
    ) -> list[RequestOutput]:
        """Answers all prompts, batched as the engine sees fit; one RequestOutput a prompt, in order.

        Args:
          prompts: one prompt or many; each text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
          sampling_params: one for all, or one a prompt; a dict of fields will do. None: get_default_sampling_params().
          prompt_token_ids: the form of vLLM 0.4: the tokens of one prompt or many, with or without their texts in
            `prompts`.
          use_tqdm: a progress bar with input and output tokens per second, or what makes one in tqdm's place.
          lora_request, multi_modal_data, refused: vLLM's (jaxllm.prompts.refuse); must be None.
          priority: one a prompt, for scheduling_policy="priority"; lower is sooner.

        Raises: ValueError or TypeError for a bad prompt or parameter, before anything is computed. On Ctrl-C the call's
          requests are ended and KeyboardInterrupt is raised; the LLM stays usable.
        """
        refuse(lora_request=lora_request, multi_modal_data=multi_modal_data, **refused)
        prompts = with_token_ids(prompts, prompt_token_ids)
        return self._finish(self._add(prompts, sampling_params, priority), use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
        lora_request: None = None,
        priority: SequenceOf[int] | None = None,
        use_tqdm: Progress = True,
        **refused: None,
    ) -> list[str]:
        """Queues prompts without computing anything; their request ids. `wait_for_completion` answers them.

        Arguments and errors are those of `generate`; queueing has no progress bar.
        """
        refuse(lora_request=lora_request, **refused)
        return self._enqueue(self._add(prompts, sampling_params, priority))

    def enqueue_chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        *,
        priority: SequenceOf[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """Queues conversations, as `enqueue` does prompts; the other arguments are those of `chat`."""
        prompts = self._chat_prompts(messages, lora_request=lora_request, **options)
        return self._enqueue(self._add(prompts, sampling_params, priority))

    def wait_for_completion(self, *, use_tqdm: Progress = True) -> list[RequestOutput]:
        """Answers all that has been enqueued; one RequestOutput a prompt, in the order in which they were."""
        ids, self._enqueued = self._enqueued, []
        return self._finish(ids, use_tqdm)

    def _enqueue(self, ids: list[str]) -> list[str]:
        self._inboxes |= dict.fromkeys(ids, self._enqueued_inbox)
        self._enqueued += ids
        return ids

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        *,
        priority: SequenceOf[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **refused: None,
    ) -> list[RequestOutput]:
        """Answers conversations, one RequestOutput each, in order.

        Args:
          messages: one conversation or many: a list of {"role": ..., "content": ...}. Content is text, or a list of
            {"type": "text", "text": ...} parts, which are joined by newlines.
          sampling_params, use_tqdm, lora_request, priority, refused: as in `generate`.
          chat_template: None: the engine's `chat_template`, else the tokenizer's.
          chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs: as in
            jaxllm.tokenizer.Tokenizer.apply_chat_template.
          chat_template_content_format: "auto" or "string", for templates are given text.

        Raises: ValueError or TypeError for messages that are not such, or do not fit the template; ValueError without a
          tokenizer.
        """
        prompts = self._chat_prompts(
            messages, chat_template, chat_template_content_format, add_generation_prompt, continue_final_message,
            tools, chat_template_kwargs, lora_request=lora_request, **refused,
        )  # fmt: skip
        return self._finish(self._add(prompts, sampling_params, priority), use_tqdm)

    def _chat_prompts(
        self,
        messages: Any,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **refused: None,
    ) -> list[Prompt]:
        """Conversations as prompts with text and token ids."""
        refuse(**refused)
        if chat_template_content_format not in ("auto", "string"):
            raise ValueError(
                f'chat_template_content_format must be "auto" or "string", got {chat_template_content_format!r}'
            )
        tokenizer, template = self.llm_engine.tokenizer, chat_template or self.config.chat_template
        if tokenizer is None:
            raise ValueError("messages need a chat template, and the engine has no tokenizer (skip_tokenizer_init)")
        options = {
            "tools": tools,
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        } | checked_template_options(chat_template_kwargs)
        texts = [tokenizer.apply_chat_template(one, **options) for one in as_conversations(messages)]
        encoded = tokenizer.encode_all(texts, add_special_tokens=False)  # the template has written them
        return [{"prompt": text, "prompt_token_ids": ids} for text, ids in zip(texts, encoded, strict=True)]

    # --- vectors

    def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        pooling_params: PoolingLike | SequenceOf[PoolingLike] | None = None,
        *,
        use_tqdm: Progress = True,
        **refused: None,
    ) -> list[EmbeddingRequestOutput]:
        """Each prompt's embedding, of the hidden states after the last norm.

        Args:
          prompts: as in `generate`.
          pooling_params: one for all, or one a prompt; a dict of fields will do. How tokens become one vector, and
            whether it is normalized, is the engine's `pooler_config`, or what the checkpoint says.
          use_tqdm, refused: as in `generate`.
        """
        refuse(**refused)
        pooled = self._pool(prompts, pooling_params, "embed", use_tqdm)
        return [_with(EmbeddingRequestOutput, one, EmbeddingOutput(one.outputs.tolist())) for one in pooled]

    def classify(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        pooling_params: PoolingLike | SequenceOf[PoolingLike] | None = None,
        *,
        use_tqdm: Progress = True,
        **refused: None,
    ) -> list[ClassificationRequestOutput]:
        """Each prompt's class probabilities, by a sequence classifier; arguments as in `embed`."""
        refuse(**refused)
        pooled = self._pool(prompts, pooling_params, "classify", use_tqdm)
        return [_with(ClassificationRequestOutput, one, ClassificationOutput(one.outputs.tolist())) for one in pooled]

    def encode(
        self,
        prompts: Prompt | SequenceOf[Prompt] | None = None,
        pooling_params: PoolingLike | SequenceOf[PoolingLike] | None = None,
        prompt_token_ids: SequenceOf[int] | SequenceOf[SequenceOf[int]] | None = None,
        use_tqdm: Progress = True,
        *,
        pooling_task: str | None = None,
        **refused: None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What `pooling_task` makes of each prompt, as an array.

        Args:
          pooling_task: "embed" or "classify": f32[...] as of the methods of that name. "token_embed": f32[T, D], each
            token's embedding. None: the task in `pooling_params`, else what the model is for.
          prompt_token_ids: as in `generate`. The other arguments are as in `embed`.
        """
        refuse(**refused)
        if pooling_task not in (None, *TASKS):
            raise ValueError(f"pooling_task must be one of {', '.join(TASKS)}, got {pooling_task!r}")
        task = pooling_task
        pooled = self._pool(with_token_ids(prompts, prompt_token_ids), pooling_params, task, use_tqdm)
        return [_with(PoolingRequestOutput, one, PoolingOutput(one.outputs)) for one in pooled]

    def score(
        self,
        data_1: str | SequenceOf[str],
        data_2: str | SequenceOf[str],
        *,
        use_tqdm: Progress = True,
        pooling_params: PoolingLike | None = None,
        **refused: None,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together, pair by pair; one text in `data_1` goes with each of `data_2`.

        A reranker (a sequence classifier with one label) is given both texts of a pair; of other models it is the
        cosine of their embeddings, whatever `pooling_params` says of their lengths.

        Raises: ValueError for lists of other lengths, or a classifier with more labels.
        """
        refuse(**refused)
        first = [data_1] if isinstance(data_1, str) else list(data_1)
        second = [data_2] if isinstance(data_2, str) else list(data_2)
        first *= len(second) if len(first) == 1 else 1
        if len(first) != len(second):
            raise ValueError(f"data_1 has {len(first)} texts and data_2 {len(second)}: it must be 1 or as many")
        if self.llm_engine.num_labels:
            return self._rerank(first, second, pooling_params, use_tqdm)
        params = dataclasses.replace(PoolingParams.of(pooling_params, "embed"), use_activation=True)
        pooled = self._pool([*first, *second], params, "embed", use_tqdm)
        pairs = zip(pooled[: len(first)], pooled[len(first) :], strict=True)
        return [_with(ScoringRequestOutput, a, ScoringOutput(float(a.outputs @ b.outputs))) for a, b in pairs]

    def _rerank(
        self, first: list[str], second: list[str], params: PoolingLike | None, use_tqdm: Progress
    ) -> list[ScoringRequestOutput]:
        engine = self.llm_engine
        if engine.num_labels != 1 or engine.tokenizer is None:
            raise ValueError(f"score needs a tokenizer and a classifier with 1 label, this has {engine.num_labels}")
        prompts = [{"prompt_token_ids": engine.tokenizer.encode_pair(a, b)} for a, b in zip(first, second, strict=True)]
        pooled = self._pool(prompts, params, "classify", use_tqdm)
        return [_with(ScoringRequestOutput, one, ScoringOutput(float(one.outputs[0]))) for one in pooled]

    def _pool(self, prompts: Any, params: Any, task: str | None, use_tqdm: Progress) -> list[PoolingRequestOutput[Any]]:
        """One output a prompt, of a NumPy array f32[...]; all are checked before any is queued."""
        engine, prompts = self.llm_engine, self.llm_engine.tokenize(as_prompts(prompts))
        every = [params] * len(prompts) if isinstance(params, PoolingParams | Mapping | None) else list(params)
        if len(every) != len(prompts):
            raise ValueError(f"pooling_params has {len(every)} entries for {len(prompts)} prompts")
        ready = [
            engine.prepare_pooling(prompt, PoolingParams.of(one, task, default=engine.pooling_task))
            for prompt, one in zip(prompts, every, strict=True)
        ]
        ids = self._add_all(len(ready), lambda request_id, i: engine.add_pooling_request(request_id, ready[i]))
        outputs = self._finish(ids, use_tqdm)
        for i, output in enumerate(outputs):
            if output.finish_reason != "stop":
                raise RuntimeError(f"the step that computed prompt {i} failed: see the log")
        return outputs

    # --- the engine

    def get_metrics(self) -> list[Metric]:
        """What the engine has done so far and holds now: jaxllm.metrics objects under vLLM's names."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets the KV of all earlier prompts. Returns True, as vLLM does when it has worked.

        Raises: ValueError unless vLLM's two arguments are False: running requests keep their KV.
        """
        for name, value in (("reset_running_requests", reset_running_requests), ("reset_connector", reset_connector)):
            if value:
                raise ValueError(f"{name} must be False, got {value!r}: running requests keep their KV")
        self.llm_engine.reset_prefix_cache()
        return True

    def reset_mm_cache(self) -> None:
        """Does nothing, for models take text alone: there is no such cache."""

    def apply_model(self, func: Callable[[Params], ResultT]) -> list[ResultT]:
        """`func` of the weights, a nested dict of arrays on the device; a list of its results, one a worker: of one.

        The weights stay what they are, whatever it returns.
        """
        if self.llm_engine.is_sleeping:
            raise RuntimeError("the engine is asleep: call wake_up() before apply_model()")
        return [func(self.llm_engine.runner.params)]

    def sleep(self, level: int = 1, mode: str | None = None) -> None:
        """Frees the device's memory until `wake_up`: the KV pages, with the cached prefixes, and the weights.

        Args:
          level: 1 keeps the weights in host memory; 2 drops them, and `wake_up` reads the checkpoint again.
          mode: "abort" ends unfinished requests (finish_reason "abort"); None: there must be none.

        The memory is free for other JAX work of this process; for other processes see jaxllm.sleep.

        Raises: ValueError for another level or mode, or level 2 with weights given as `params`; RuntimeError while
          requests are unfinished.
        """
        check_sleep_mode(mode)
        if mode == "abort":
            for output in self.llm_engine.abort_request(list(self._inboxes)):
                self._inboxes[output.request_id].append(output)
        self.llm_engine.sleep(level)

    def wake_up(self, tags: SequenceOf[str] | None = None) -> None:
        """Restores what `sleep` has freed: "weights", "kv_cache", or None for both. Requests need both."""
        self.llm_engine.wake_up(tags)

    def start_profile(self) -> None:
        """Has the JAX profiler record until `stop_profile`, into the folder `profiler_dir` or $JAXLLM_PROFILER_DIR.

        Raises: ValueError if neither is set; RuntimeError if a profile is being taken already.
        """
        profiling.start(self.config.profiler_dir)

    def stop_profile(self) -> None:
        """Ends the recording and writes it. Raises RuntimeError if there is none."""
        profiling.stop()

    def _finish(self, ids: list[str], use_tqdm: Progress) -> list[Any]:
        """The outputs of the given requests when all of them have finished."""
        finished: dict[str, RequestOutput] = {}
        with ProgressBar(len(ids), use_tqdm) as bar, closing(self._run(ids)) as outputs:
            for output in outputs:
                finished[output.request_id] = output
                bar.update(output)
        return [finished[request_id] for request_id in ids]

    def stream(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yields each request's output as it grows, several requests at once; the last of each is `finished`.

        Outputs are cumulative; `request_id` is the prompt's position. Leaving the loop early ends the requests.
        """
        return self._stream(self._prepare(prompts, sampling_params))

    def _stream(self, prepared: list[PreparedRequest]) -> Iterator[RequestOutput]:
        """Queues the requests when the first output is asked for: what is never iterated leaves nothing behind."""
        ids = self._queue(prepared, None, streaming=True)
        positions = {request_id: str(i) for i, request_id in enumerate(ids)}
        with closing(self._run(ids)) as outputs:
            for output in outputs:
                output.request_id = positions[output.request_id]
                yield output

    def beam_search(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: Progress = False,
        concurrency_limit: int | None = None,
        priority: SequenceOf[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` answers with the highest scores to each prompt, the best first.

        Args:
          prompts, use_tqdm, priority: as in `generate`.
          lora_request: must be None.
          concurrency_limit: at most so many prompts at a time; None: as the engine sees fit.

        Raises: as `generate` does.
        """
        refuse(lora_request=lora_request)
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ValueError(f"concurrency_limit must be None or at least 1, got {concurrency_limit}")
        prompts = as_prompts(prompts)
        size, sampling, outputs = concurrency_limit or max(len(prompts), 1), params.sampling_params(), []
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            ranks = None if priority is None else priority[some]
            outputs += self.generate(prompts[some], sampling, use_tqdm=use_tqdm, priority=ranks)
        return [self._beam_search_output(output, params) for output in outputs]

    def _beam_search_output(self, output: RequestOutput, params: BeamSearchParams) -> BeamSearchOutput:
        sequences = []
        for one in output.outputs:
            tokens = output.prompt_token_ids + one.token_ids
            stopped = one.finish_reason == "stop" and not params.include_stop_str_in_output
            text = self._text_of(tokens[:-1] if stopped else tokens, params.skip_special_tokens)
            sequences.append(
                BeamSearchSequence(
                    tokens, one.logprobs or [], one.cumulative_logprob or 0.0, text, one.finish_reason, one.stop_reason
                )
            )
        return BeamSearchOutput(sequences)

    def _text_of(self, tokens: list[int], skip_special_tokens: bool) -> str | None:
        tokenizer = self.get_tokenizer()
        return None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def _add(self, prompts: Any, params: Any, priority: SequenceOf[int] | None) -> list[str]:
        """Checks all requests, then queues all of them; returns their ids."""
        return self._queue(self._prepare(prompts, params), priority)

    def _queue(
        self, prepared: list[PreparedRequest], priority: SequenceOf[int] | None, streaming: bool = False
    ) -> list[str]:
        """Queues requests, all of them or none; returns their ids."""
        if priority is not None and len(priority) != len(prepared):
            raise ValueError(f"priority has {len(priority)} entries for {len(prepared)} prompts")
        ranks = [0] * len(prepared) if priority is None else priority

        def add(request_id: str, i: int) -> None:
            self.llm_engine.add_request(request_id, prepared[i], priority=ranks[i], streaming=streaming)

        return self._add_all(len(prepared), add)

    def _add_all(self, count: int, add: Callable[[str, int], None]) -> list[str]:
        """Has `add` queue requests by id and position, all of them or none; returns their ids."""
        ids = [str(next(self._ids)) for _ in range(count)]
        try:
            for i, request_id in enumerate(ids):
                add(request_id, i)
        except BaseException:
            self.llm_engine.abort_request(ids)
            raise
        self._open_inbox(ids)
        return ids

    def _prepare(self, prompts: Any, params: Any) -> list[PreparedRequest]:
        prompts = self.llm_engine.tokenize(as_prompts(prompts))
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams | Mapping):
            params = [SamplingParams.of(params)] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"sampling_params has {len(params)} entries for {len(prompts)} prompts")
        return [self.llm_engine.prepare(prompt, one) for prompt, one in zip(prompts, params, strict=True)]

    def _open_inbox(self, ids: list[str]) -> None:
        """Has the outputs of these requests wait for the call that they belong to, whichever call makes the steps."""
        inbox: deque[Any] = deque()  # one for all of them
        self._inboxes |= {request_id: inbox for request_id in ids}

    def _run(self, ids: list[str]) -> Iterator[Any]:
        """Steps until the given requests have finished; ends them if it is left before that."""
        engine, unfinished = self.llm_engine, set(ids)
        inbox = self._inboxes[ids[0]] if ids else deque()
        try:
            while unfinished:
                with deferred_interrupt() as interrupt:
                    for output in () if inbox else engine.step():
                        self._inboxes.get(output.request_id, deque()).append(output)
                while inbox:
                    output = inbox.popleft()
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
                interrupt.check()
        finally:
            engine.abort_request(unfinished)
            for request_id in ids:
                self._inboxes.pop(request_id, None)
            if not engine.has_unfinished_requests():
                engine.drain()


def _with(kind: type, pooled: PoolingRequestOutput[Any], outputs: Any) -> Any:
    return kind(pooled.request_id, outputs, pooled.prompt_token_ids)


_kept: tuple[dict[str, Any], LLM] | None = None


def generate(
    prompts: Prompt | SequenceOf[Prompt],
    params: ParamsLike | SequenceOf[ParamsLike] | None = None,
    *,
    model: Any = None,
    use_tqdm: bool = False,
    **engine_args: Any,
) -> list[RequestOutput]:
    """Answers prompts in one call. The engine is kept for the next call with the same model and engine arguments.

    Args:
      prompts, params: as in LLM.generate.
      model: as in LLM; None: the embedded default model.
      **engine_args: any field of EngineConfig.
    """
    global _kept
    wanted = {"model": model, **engine_args}
    if _kept is None or _kept[0] != wanted:
        _kept = None  # the old engine's memory is needed for the new one
        _kept = (wanted, LLM(**wanted))
    return _kept[1].generate(prompts, params, use_tqdm=use_tqdm)
