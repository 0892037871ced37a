"""The runner's side of logit controls: the tables, the masks that the host makes, and logits processors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.runner.constraints import check_something_is_left, combined_mask, run_processors
from jaxllm.runner.controls import abstract_tables, neutral_row, num_words, own_columns, write_row
from jaxllm.scheduling import StepPlan
from jaxllm.scheduling.request import Request

logger = logging.getLogger(__name__)

_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class ControlProgram:
    """A small program's key: a table row's upload, or a logits row's way to the host and back (from S rows)."""

    work: Literal["write table row", "take logits", "put logits"]
    num_rows: int = 0

    def __str__(self) -> str:
        return f"{self.work} {self.num_rows or ''}".rstrip()


class HostSampling:
    """Owns the control tables on the device, and says what the host has to say in a step with controls.

    Args:
      programs: compiled program of a ControlProgram.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, programs: Callable[[ControlProgram], Any]) -> None:
        self.vocab_size = vocab_size
        self.abstract_tables = abstract_tables(max_num_seqs, vocab_size)
        self._programs = programs
        self._neutral_row = jax.device_put(neutral_row(vocab_size))  # what is neutral need not be sent
        self._everything: dict[int, jax.Array] = {}  # by rows: a mask that allows all tokens
        self._threads = ThreadPoolExecutor(_THREADS, "constraints")  # which start when they are needed
        self.reset()

    def reset(self) -> None:
        """Fresh tables: at the start, and after a failed step has taken the donated ones with it."""
        self.release()  # first, or there would be two
        self.tables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.abstract_tables)

    def release(self) -> None:
        """Frees the tables."""
        self.tables = None

    def admit(self, slot: int, request: Request) -> None:
        """Uploads what belongs to a request that has just come into this slot."""
        if request.sampling.controlled:
            row = self._neutral_row._replace(**own_columns(request, self.vocab_size))
            self.tables = self._programs(ControlProgram("write table row"))(self.tables, np.int32(slot), row)

    def say(
        self, plan: StepPlan, stepwise: Sequence[int], logits: jax.Array
    ) -> tuple[jax.Array, jax.Array | np.ndarray, list[Request]]:
        """What the host has to say of the `stepwise` rows: their logits, what they may sample, and who failed.

        Returns: f32[S, V] logits after the logits processors; i32[S, V/32] mask by the constraints; the requests whose
          processors or constraints raised, which must end.
        """
        masks, failed = {}, []
        requests = [plan.requests[row] for row in stepwise]
        for row, request, mask in zip(stepwise, requests, self._masks_of(requests), strict=True):
            try:
                if isinstance(mask, Exception):
                    raise mask
                if request.sampling.logits_processors:
                    logits = self._process(request, row, logits, mask)
            except Exception:
                logger.exception("sampling for request %s failed on the host; the request ends", request.id)
                failed.append(request)
            else:
                masks |= {} if mask is None else {row: mask}
        return logits, self._mask(masks, len(logits)), failed

    def _masks_of(self, requests: Sequence[Request]) -> list[np.ndarray | Exception | None]:
        """What each request's constraints allow, or what they raised.

        By several threads: a grammar's work is done without Python's lock, and a step may have hundreds of rows.
        """
        count = min(len(requests), _THREADS)
        if count < 2:
            return [_mask_of(request) for request in requests]
        masks: list[np.ndarray | Exception | None] = [None] * len(requests)
        parts = self._threads.map(lambda first: [_mask_of(one) for one in requests[first::count]], range(count))
        for first, part in enumerate(parts):
            masks[first::count] = part
        return masks

    def _mask(self, masks: dict[int, np.ndarray], num_rows: int) -> jax.Array | np.ndarray:
        if not masks:
            return self.all_allowed(num_rows)
        whole = np.full((num_rows, num_words(self.vocab_size)), -1, np.int32)
        whole[list(masks)] = list(masks.values())
        return whole

    def all_allowed(self, num_rows: int) -> jax.Array:
        if num_rows not in self._everything:
            words = np.full((num_rows, num_words(self.vocab_size)), -1, np.int32)
            self._everything[num_rows] = jax.device_put(words)
        return self._everything[num_rows]

    def _process(self, request: Request, row: int, logits: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """The logits with this row as the request's logits processors leave it; `mask` is its constraints'."""
        taken = self._programs(ControlProgram("take logits", len(logits)))(logits, np.int32(row))
        values = run_processors(request, np.array(taken))
        check_something_is_left(request, values, mask)
        return self._programs(ControlProgram("put logits", len(logits)))(logits, np.int32(row), values)

    def programs(self, row_counts: list[int]) -> list[ControlProgram]:
        """Keys of everything that may ever be run."""
        moves = [ControlProgram(work, rows) for rows in row_counts for work in ("take logits", "put logits")]
        return [ControlProgram("write table row"), *moves]

    def lower(self, key: ControlProgram) -> jax.stages.Lowered:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        if key.work == "write table row":
            row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.abstract_tables)
            return jax.jit(write_row, donate_argnums=0).lower(self.abstract_tables, index, row)
        logits = jax.ShapeDtypeStruct((key.num_rows, self.vocab_size), jnp.float32)
        if key.work == "take logits":
            return jax.jit(lambda logits, row: logits[row]).lower(logits, index)
        put = jax.jit(lambda logits, row, values: logits.at[row].set(values), donate_argnums=0)
        return put.lower(logits, index, jax.ShapeDtypeStruct((self.vocab_size,), jnp.float32))


def _mask_of(request: Request) -> np.ndarray | Exception | None:
    spec = request.sampling
    try:
        # A beam that nothing may follow ends without a word: the search goes on with the others.
        return combined_mask(spec.constraints, request.output_token_ids, may_be_empty=spec.processed_logprobs)
    except Exception as error:
        return error
