"""AsyncLLM: the engine for asyncio programs. One thread owns it and steps it; each request is an async iterator."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

from jaxllm import profiling
from jaxllm.config import EngineConfig
from jaxllm.engine import LLMEngine, Prompt, check_request_id
from jaxllm.loading import build_engine
from jaxllm.metrics import Metric
from jaxllm.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput
from jaxllm.pooling import PoolingParams
from jaxllm.prompts import refuse
from jaxllm.sampling_params import SamplingParams
from jaxllm.sleep import check_sleep_mode
from jaxllm.validation import missing_attribute

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class EngineDead(RuntimeError):
    """The engine has been shut down."""


class AsyncLLM:
    """A model that answers many requests at once, each as an async iterator of its growing output.

    Args:
      engine: from `jaxllm.loading.build_engine`; nobody else may use it from now on. See also `from_engine_args`.

    Use `shutdown`, or `async with`, to end it. A request that fails, or whose iterator is left, ends alone.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._worker = _Worker(engine)
        self._engine = engine
        self._stop = weakref.finalize(self, self._worker.stop)  # also when the interpreter exits

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig, params: Any = None) -> AsyncLLM:
        """From settings (AsyncEngineArgs is another name of EngineConfig); `params` as in LLM."""
        return cls(build_engine(engine_args, params))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | Mapping[str, Any] | None,
        request_id: str,
        lora_request: None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs, as `sampling_params.output_kind` says; the last one is `finished`.

        Args:
          prompt: text, token ids or a dict of either.
          sampling_params: None: what the model's generation_config.json sets.
          request_id: unique among the unfinished requests.
          priority: for scheduling_policy="priority"; lower is sooner.

        Raises: ValueError or TypeError for a bad prompt or parameter; EngineDead after `shutdown`. Leaving the iterator
          (aclose, break, cancellation) ends the request.
        """
        refuse(lora_request=lora_request)

        def add(engine: LLMEngine) -> None:
            params = SamplingParams(**engine.sampling_defaults) if sampling_params is None else sampling_params
            engine.add_request(request_id, prompt, params, priority=priority)

        async with aclosing(self._follow(request_id, add)) as outputs:
            async for output in outputs:
                yield output

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | Mapping[str, Any] | None,
        request_id: str,
        lora_request: None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[PoolingRequestOutput[PoolingOutput]]:
        """Yields one output, of the array that `pooling_params.task` makes of the prompt (see LLM.encode).

        Args:
          pooling_params: without a task: what the model is for.
          prompt, request_id, priority: as in `generate`.

        Raises: as `generate` does. An aborted or failed request's output says so (`finish_reason`) and holds no array.
        """
        refuse(lora_request=lora_request)

        def add(engine: LLMEngine) -> None:
            params = PoolingParams.of(pooling_params, None, default=engine.pooling_task)
            engine.add_pooling_request(request_id, engine.prepare_pooling(prompt, params), priority=priority)

        async with aclosing(self._follow(request_id, add)) as outputs:
            async for output in outputs:
                output.outputs = PoolingOutput(output.outputs)
                yield output

    async def _follow(self, request_id: str, add: Callable[[LLMEngine], None]) -> AsyncGenerator[Any, None]:
        """The outputs of the request that `add` queues; it ends if it is left before they have."""
        check_request_id(request_id)
        stream = _Stream(asyncio.get_running_loop())
        finished = False
        try:
            await self._call(lambda: self._worker.add(stream, request_id, add))
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._worker.post(lambda: self._worker.leave(request_id, stream))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; each yields one more output, with finish_reason "abort". Unknown ids are ignored."""
        await self._call(lambda: self._worker.abort(request_id))

    async def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None with skip_tokenizer_init."""
        return None if self._engine.tokenizer is None else self._engine.tokenizer.hf

    async def get_metrics(self) -> list[Metric]:
        """As LLM.get_metrics."""
        return await self._call(self._engine.get_metrics)

    async def reset_prefix_cache(self) -> bool:
        """As LLM.reset_prefix_cache."""
        await self._call(self._engine.reset_prefix_cache)
        return True

    async def sleep(self, level: int = 1, mode: str | None = None) -> None:
        """As LLM.sleep."""
        check_sleep_mode(mode)
        if mode == "abort":
            await self._call(self._worker.abort_all)
        await self._call(lambda: self._engine.sleep(level))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """As LLM.wake_up."""
        await self._call(lambda: self._engine.wake_up(tags))

    async def start_profile(self) -> None:
        """As LLM.start_profile."""
        profiling.start(self._engine.config.profiler_dir)

    async def stop_profile(self) -> None:
        """As LLM.stop_profile."""
        profiling.stop()

    async def is_sleeping(self) -> bool:
        return self._engine.is_sleeping

    async def check_health(self) -> None:
        """Raises EngineDead after `shutdown`."""
        await self._call(lambda: None)

    @property
    def is_running(self) -> bool:
        return self._stop.alive

    def shutdown(self) -> None:
        """Ends all requests (finish_reason "abort") and the thread; waits for it. A second call does nothing."""
        self._stop()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def __getattr__(self, name: str) -> Any:
        raise missing_attribute(self, name)

    async def _call(self, function: Callable[[], ResultT]) -> ResultT:
        return await asyncio.wrap_future(self._worker.call(function))


AsyncLLMEngine = AsyncLLM  # its name in older versions of vLLM


class _Stream:
    """One request's outputs, on their way from the engine's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    async def get(self) -> RequestOutput:
        item = await self.items.get()
        if isinstance(item, Exception):
            raise item
        return item


class _Worker:
    """The thread that owns the engine. Others hand it functions, which it calls between steps, in order."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._stopped = False
        self._lock = threading.Lock()  # of `_stopped` and of what is put into `_jobs` before it is set
        self._thread = threading.Thread(target=self._run, name="jaxllm engine", daemon=True)
        self._thread.start()

    # --- from any thread

    def call(self, function: Callable[[], ResultT]) -> Future[ResultT]:
        """Has the thread call a function; raises EngineDead if it has ended."""
        future: Future[ResultT] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        if not self.post(job):
            raise EngineDead("the engine has been shut down")
        return future

    def post(self, job: Callable[[], None]) -> bool:
        """Has the thread call `job`, whose errors are logged and nobody gets; False if it has ended."""
        with self._lock:
            if not self._stopped:
                self._jobs.put(job)
            return not self._stopped

    def stop(self) -> None:
        """Ends the requests and the thread, and waits for it."""
        with self._lock:
            if not self._stopped:
                self._jobs.put(self.abort_all)
                self._stopped = True
        if self._thread is not threading.current_thread():
            self._thread.join()

    # --- in the thread

    def add(self, stream: _Stream, request_id: str, add: Callable[[LLMEngine], None]) -> None:
        add(self._engine)
        self._streams[request_id] = stream

    def abort(self, request_ids: str | Iterable[str]) -> None:
        self._deliver(self._engine.abort_request(request_ids))

    def abort_all(self) -> None:
        self.abort(list(self._streams))

    def leave(self, request_id: str, stream: _Stream) -> None:
        """Ends the request of a stream that nobody reads any more."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort_request(request_id)

    def _run(self) -> None:
        while not self._stopped or not self._jobs.empty():
            self._do_jobs()
            try:
                self._deliver(self._engine.step())
            except Exception as error:
                logger.exception("a step's outputs failed; all requests end")
                self._fail_all(error)
        self._engine.drain()

    def _do_jobs(self) -> None:
        """Calls what has been handed over; waits for it while there is nothing else to do."""
        if not self._engine.has_unfinished_requests():
            self._engine.drain()
            self._do(self._jobs.get())
        while not self._jobs.empty():
            self._do(self._jobs.get())

    @staticmethod
    def _do(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            logger.exception("what another thread handed over failed; the engine goes on")

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hands outputs to their streams, with one call for each event loop."""
        found: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = defaultdict(list)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                found[stream.loop].append((stream, output))
                if output.finished:
                    del self._streams[output.request_id]
        for loop, items in found.items():
            self._send(loop, items)

    def _send(self, loop: asyncio.AbstractEventLoop, items: list[tuple[_Stream, Any]]) -> None:
        try:
            loop.call_soon_threadsafe(_put_all, items)
        except RuntimeError:  # the loop is closed: nobody will read them
            gone = {stream for stream, _ in items}
            for request_id in [name for name, stream in self._streams.items() if stream in gone]:
                self.leave(request_id, self._streams[request_id])

    def _fail_all(self, error: Exception) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._send(stream.loop, [(stream, error)])
        self._engine.abort_request(list(streams))


def _put_all(items: list[tuple[_Stream, Any]]) -> None:
    for stream, item in items:
        stream.items.put_nowait(item)
