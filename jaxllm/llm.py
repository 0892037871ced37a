"""LLM and generate(): offline use. Prompts in, answers out, in the prompts' order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import closing
from typing import Any

from tqdm import tqdm

from jaxllm.config import EngineConfig
from jaxllm.engine import LLMEngine, PreparedRequest, Prompt
from jaxllm.interrupts import deferred_interrupt
from jaxllm.loading import build_engine, sampling_defaults
from jaxllm.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from jaxllm.sampling_params import BeamSearchParams, SamplingParams

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
      architecture, missing or wrong weights, or no tokenizer.
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, *, params: Any = None, **engine_args: Any) -> None:
        self.config = EngineConfig.create(model=model, tokenizer=tokenizer, **engine_args)
        self.llm_engine: LLMEngine = build_engine(self.config, params)
        self._defaults = sampling_defaults(self.config)
        self._ids = itertools.count()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None with skip_tokenizer_init."""
        tokenizer = self.llm_engine.tokenizer
        return None if tokenizer is None else tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given none: the defaults, with what the model's generation_config.json sets."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: ParamsLike | SequenceOf[ParamsLike] | None = None,
        use_tqdm: bool = True,
        *,
        priority: SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers all prompts, batched as the engine sees fit; one RequestOutput a prompt, in order.

        Args:
          prompts: one prompt or many; each text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
          sampling_params: one for all, or one a prompt; a dict of fields will do. None: get_default_sampling_params().
          use_tqdm: a progress bar with input and output tokens per second.
          priority: one a prompt, for scheduling_policy="priority"; lower is sooner.

        Raises: ValueError or TypeError for a bad prompt or parameter, before anything is computed. On Ctrl-C the call's
          requests are ended and KeyboardInterrupt is raised; the LLM stays usable.
        """
        ids = self._add(prompts, sampling_params, priority, streaming=False)
        finished: dict[str, RequestOutput] = {}
        with _ProgressBar(len(ids), use_tqdm) as bar, closing(self._run(ids)) as outputs:
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
        ids = self._add(prompts, sampling_params, None, streaming=True)
        positions = {request_id: str(i) for i, request_id in enumerate(ids)}
        return self._renamed(self._run(ids), positions)

    def beam_search(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
        priority: SequenceOf[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` answers with the highest scores to each prompt, the best first.

        Args:
          prompts, use_tqdm, priority: as in `generate`.
          lora_request: None; adapters are merged while loading.
          concurrency_limit: at most so many prompts at a time; None: as the engine sees fit.

        Raises: as `generate` does.
        """
        if lora_request is not None:
            raise ValueError(f"lora_request must be None, got {lora_request!r}: load the adapter with LLM(lora=...)")
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ValueError(f"concurrency_limit must be None or at least 1, got {concurrency_limit}")
        prompts = as_prompts(prompts)
        size, sampling, outputs = concurrency_limit or max(len(prompts), 1), params.sampling_params(), []
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            ranks = None if priority is None else priority[some]
            outputs += self.generate(prompts[some], sampling, use_tqdm, priority=ranks)
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

    @staticmethod
    def _renamed(outputs: Iterator[RequestOutput], names: dict[str, str]) -> Iterator[RequestOutput]:
        for output in outputs:
            output.request_id = names[output.request_id]
            yield output

    def _add(self, prompts: Any, params: Any, priority: SequenceOf[int] | None, streaming: bool) -> list[str]:
        """Checks all requests, then queues all of them; returns their ids."""
        prepared = self._prepare(prompts, params)
        if priority is not None and len(priority) != len(prepared):
            raise ValueError(f"priority has {len(priority)} entries for {len(prepared)} prompts")
        ids = [str(next(self._ids)) for _ in prepared]
        for i, (request_id, ready) in enumerate(zip(ids, prepared, strict=True)):
            rank = 0 if priority is None else priority[i]
            self.llm_engine.add_request(request_id, ready, priority=rank, streaming=streaming)
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

    def _run(self, ids: list[str]) -> Iterator[RequestOutput]:
        """Steps until the given requests have finished; ends them if it is left before that."""
        engine, unfinished = self.llm_engine, set(ids)
        try:
            while unfinished:
                with deferred_interrupt() as interrupt:
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
                interrupt.check()
        finally:
            engine.abort_request(unfinished)
            if not engine.has_unfinished_requests():
                engine.drain()


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many -> many. A sequence of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, SequenceOf):
        raise TypeError(f"prompts must be a prompt or a sequence of prompts, got {prompts!r:.100}")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [list(prompts)]
    return list(prompts)


class _ProgressBar:
    """vLLM's bar: "Processed prompts", with input and output tokens per second."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar = tqdm(
            total=total,
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not enabled,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        self._tokens_in = self._tokens_out = 0

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, output: RequestOutput) -> None:
        self._tokens_in += len(output.prompt_token_ids)
        self._tokens_out += sum(len(one.token_ids) for one in output.outputs)
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        speed_in, speed_out = self._tokens_in / elapsed, self._tokens_out / elapsed
        self._bar.postfix = f"est. speed input: {speed_in:.2f} toks/s, output: {speed_out:.2f} toks/s"
        self._bar.update()


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
    return _kept[1].generate(prompts, params, use_tqdm)
