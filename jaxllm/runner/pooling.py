"""Pooling on the device: the hidden states of a row's tokens -> one vector a row, a chunk of the prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.scheduling import StepPlan
from jaxllm.scheduling.request import Request

Pooling = Literal["mean", "last", "cls", "all"]  # "all": not one vector, but every token's


class PooledRows:
    """A step's pooled rows, fetched from the device when somebody looks.

    Args:
      rows: of each, the row, its request, where its chunk of the prompt began, and its tokens in the flat step.
      sums: f32[S, D] (see `pool`). hidden: [T, D] of the step's tokens. Either is None if no row needs it.
    """

    def __init__(
        self, rows: list[tuple[int, Request, int, slice]], sums: jax.Array | None, hidden: jax.Array | None
    ) -> None:
        self._rows, self._sums, self._hidden = rows, sums, hidden

    def __iter__(self) -> Iterator[tuple[Request, int, np.ndarray]]:
        """Each request, where its chunk began, and the chunk's part: f32[D] of the sum, or f32[count, D] of "all"."""
        sums = None if self._sums is None else np.asarray(self._sums)
        hidden = None if self._hidden is None else np.asarray(self._hidden)
        for row, request, start, tokens in self._rows:
            if request.sampling.pooling == "all":
                assert hidden is not None
                yield request, start, hidden[tokens].astype(np.float32)
            else:
                assert sums is not None
                yield request, start, sums[row]


def pool(hidden: jax.Array, starts: jax.Array, stops: jax.Array) -> jax.Array:
    """Sums of hidden [T, D] over each row's tokens starts:stops (i32[S]) -> f32[S, D].

    A product with a matrix of ones and zeros, so that the order of the sum, and the result, do not change from run to
    run as a scatter's would.
    """
    index = jnp.arange(hidden.shape[0], dtype=jnp.int32)
    chosen = (index >= starts[:, None]) & (index < stops[:, None])
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jnp.matmul(chosen.astype(hidden.dtype), hidden, precision=precision, preferred_element_type=jnp.float32)


_pool = jax.jit(pool)  # compiled for a shape when a request that wants it first meets the shape


def submit(plan: StepPlan, pooled: np.ndarray, hidden: jax.Array, num_rows: int) -> PooledRows:
    """Hands the pooling of the `pooled` rows to the device; hidden [T, D] are the step's, of `num_rows` padded rows."""
    starts, stops = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    ends = np.cumsum(plan.num_tokens)
    rows = []
    for row in pooled.tolist():
        request, first, count = plan.requests[row], int(plan.starts[row]), int(plan.num_tokens[row])
        offset = int(ends[row]) - count
        rows.append((row, request, first, slice(offset, offset + count)))
        if request.sampling.pooling != "all":
            start, stop = span(request.sampling.pooling, first, count, request.prompt_len)
            starts[row], stops[row] = offset + start, offset + stop
    all_of = [request.sampling.pooling == "all" for _, request, _, _ in rows]
    sums = None if all(all_of) else _pool(hidden, starts, stops)
    return PooledRows(rows, sums, hidden if any(all_of) else None)


def span(pooling: Pooling, first: int, count: int, prompt_len: int) -> tuple[int, int]:
    """Which of a chunk's `count` tokens, the prompt's from `first` on, are summed."""
    if pooling == "mean":
        return 0, count
    if pooling == "last":
        return (count - 1, count) if first + count == prompt_len else (0, 0)
    return (0, 1) if first == 0 else (0, 0)
