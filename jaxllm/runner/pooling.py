"""Pooling on the device: the hidden states of a row's tokens -> one vector a row, a chunk of the prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.scheduling import StepPlan
from jaxllm.scheduling.request import Request

Pooling = Literal["mean", "last", "cls"]


class PooledRows:
    """A step's pooled rows, fetched from the device when somebody looks."""

    def __init__(self, rows: list[tuple[int, Request, int]], values: jax.Array) -> None:
        self._rows, self._values = rows, values

    def __iter__(self) -> Iterator[tuple[Request, int, np.ndarray]]:
        """Each request, where its chunk of the prompt began, and f32[D], the chunk's part of the sum (see `pool`)."""
        values = np.asarray(self._values)
        for row, request, start in self._rows:
            yield request, start, values[row]


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
    offsets = np.cumsum(plan.num_tokens) - plan.num_tokens
    rows = []
    for row in pooled.tolist():
        request, offset, count, first = (
            plan.requests[row],
            int(offsets[row]),
            int(plan.num_tokens[row]),
            plan.starts[row],
        )
        start, stop = span(request.sampling.pooling, int(first), count, request.prompt_len)
        starts[row], stops[row] = offset + start, offset + stop
        rows.append((row, request, int(first)))
    return PooledRows(rows, _pool(hidden, starts, stops))


def span(pooling: Pooling, first: int, count: int, prompt_len: int) -> tuple[int, int]:
    """Which of a chunk's `count` tokens, the prompt's from `first` on, are summed."""
    if pooling == "mean":
        return 0, count
    if pooling == "last":
        return (count - 1, count) if first + count == prompt_len else (0, 0)
    return (0, 1) if first == 0 else (0, 0)
