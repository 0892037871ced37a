"""Log probabilities on the device: of a token, of the likeliest ones and of those that were asked for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_RUN = 128  # tokens
WHOLE_VOCABULARY = -1  # as a count of log probabilities


class Logprobs(NamedTuple):
    """Log probabilities, natural logarithm, of the model's own distribution (before temperature and filters).

    Of a row with `processed_logprobs` (SamplingSpec), of the distribution after temperature, bias, penalties and masks.


    token: f32[S] of the given token; rank: i32[S] its rank, 1 for the likeliest.
    top_ids: i32[S, L] and top: f32[S, L], the likeliest first. For the whole vocabulary top_ids is None and top is
      f32[S, V] in the order of the ids: the host sorts what somebody looks at.
    wanted: f32[S, M], of the tokens asked for.
    """

    token: jax.Array
    rank: jax.Array
    top_ids: jax.Array | None
    top: jax.Array
    wanted: jax.Array


def log_probabilities(logits: jax.Array, tokens: jax.Array, wanted_ids: jax.Array, count: int) -> Logprobs:
    """Of f32[S, V] logits, for `tokens` i32[S], the `count` likeliest ones and `wanted_ids` i32[S, M] (-1: padding)."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = jnp.sum(logits >= chosen, axis=-1, dtype=jnp.int32)
    if count == WHOLE_VOCABULARY:
        top, top_ids = logits, None
    else:
        top, top_ids = top_k(logits, min(count, logits.shape[1]))
    wanted = jnp.take_along_axis(logits, jnp.maximum(wanted_ids, 0), axis=-1)
    return Logprobs((chosen - total)[:, 0], rank, top_ids, top - total, wanted - total)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of f32[S, V], largest first, and their indices: f32[S, k], i32[S, k].

    The k largest lie in the k runs of _RUN values whose maxima are largest, so only those maxima and then those runs
    are sorted. Of equal values the one with the smaller index comes first.
    """
    if values.shape[1] <= k * _RUN or k == 0:
        top, ids = jax.lax.top_k(values, k)
        return top, ids.astype(jnp.int32)
    padding = ((0, 0), (0, -values.shape[1] % _RUN))
    runs = jnp.pad(values, padding, constant_values=-jnp.inf).reshape(len(values), -1, _RUN)
    best = jnp.sort(jax.lax.top_k(jnp.max(runs, axis=-1), k)[1], axis=-1)
    top, where = jax.lax.top_k(jnp.take_along_axis(runs, best[:, :, None], axis=1).reshape(len(values), -1), k)
    ids = jnp.take_along_axis(best, where // _RUN, axis=1) * _RUN + where % _RUN
    return top, jnp.minimum(ids, values.shape[1] - 1).astype(jnp.int32)
