"""Logit controls on the device: penalties, bias and token masks, for requests that ask for any.

What belongs to a request and is large (which tokens its prompt has, how often its answer has each, which are allowed)
lies in tables with a row a slot. A row is uploaded when the request gets its slot, and the counts are advanced by the
step that samples; so nothing of it travels with a step, and a request that was preempted, or that runs ahead of the
host, is counted as any other.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.runner.sampler import SamplingRows, SamplingSpec
from jaxllm.scheduling.request import Request

MAX_BIASED = 1024  # tokens with a bias, of one request
MAX_WANTED = 128  # tokens whose log probabilities are asked for, of one request
_MAX_COUNT = np.iinfo(np.uint16).max


class ControlTables(NamedTuple):
    """One row a slot (R of them) or, taken for a step, one a row. Bits are in the order of the ids, lowest first."""

    counts: jax.Array  # u16[R, V] how often the answer has each token
    prompt: jax.Array  # i32[R, V/32] a bit a token: whether the prompt has it
    allowed: jax.Array  # i32[R, V/32] whether it may be sampled at all
    stops: jax.Array  # i32[R, V/32] whether it must not be before min_tokens
    bias_ids: jax.Array  # i32[R, MAX_BIASED]; V is padding
    bias: jax.Array  # f32[R, MAX_BIASED]
    wanted_ids: jax.Array  # i32[R, MAX_WANTED]; -1 is padding


def abstract_tables(max_num_seqs: int, vocab_size: int) -> ControlTables:
    words, table = num_words(vocab_size), jax.ShapeDtypeStruct
    return ControlTables(
        table((max_num_seqs, vocab_size), jnp.uint16),
        *[table((max_num_seqs, words), jnp.int32)] * 3,
        table((max_num_seqs, MAX_BIASED), jnp.int32),
        table((max_num_seqs, MAX_BIASED), jnp.float32),
        table((max_num_seqs, MAX_WANTED), jnp.int32),
    )


def neutral_row(vocab_size: int) -> ControlTables:
    """The row of a request that asks for nothing, in NumPy arrays."""
    words = num_words(vocab_size)
    return ControlTables(
        np.zeros(vocab_size, np.uint16),
        np.zeros(words, np.int32),
        np.full(words, -1, np.int32),
        np.zeros(words, np.int32),
        np.full(MAX_BIASED, vocab_size, np.int32),
        np.zeros(MAX_BIASED, np.float32),
        np.full(MAX_WANTED, -1, np.int32),
    )


def own_columns(request: Request, vocab_size: int) -> dict[str, np.ndarray]:
    """What differs from the neutral row for this request: its parameters, and its tokens so far."""
    spec: SamplingSpec = request.sampling
    columns = {}
    if spec.penalized:
        columns["prompt"] = bitmask(request.prompt, vocab_size)
        if request.output_token_ids:
            counts = np.bincount(np.array(request.output_token_ids, np.int64), minlength=vocab_size)
            columns["counts"] = np.minimum(counts, _MAX_COUNT).astype(np.uint16)
    if spec.allowed_ids is not None:
        columns["allowed"] = bitmask(spec.allowed_ids, vocab_size)
    if spec.banned_ids:
        columns["allowed"] = columns.get("allowed", np.int32(-1)) & ~bitmask(spec.banned_ids, vocab_size)
    if spec.masked_ids:
        columns["stops"] = bitmask(spec.masked_ids, vocab_size)
    if spec.bias:
        ids, values = zip(*spec.bias, strict=True)
        columns["bias_ids"] = _padded(ids, MAX_BIASED, vocab_size, np.int32)
        columns["bias"] = _padded(values, MAX_BIASED, 0, np.float32)
    if spec.logprob_ids:
        columns["wanted_ids"] = _padded(spec.logprob_ids, MAX_WANTED, -1, np.int32)
    return columns


def _padded(values: Sequence[float], size: int, fill: int, dtype: type) -> np.ndarray:
    padded = np.full(size, fill, dtype)
    padded[: len(values)] = values
    return padded


def write_row(tables: ControlTables, slot: jax.Array, row: ControlTables) -> ControlTables:
    return jax.tree.map(lambda table, values: table.at[slot].set(values), tables, row)


def take_rows(tables: ControlTables, slots: jax.Array) -> ControlTables:
    return jax.tree.map(lambda table: table.at[slots].get(mode="clip"), tables)


def control(logits: jax.Array, rows: SamplingRows, tables: ControlTables, mask: jax.Array) -> jax.Array:
    """f32[S, V] logits with bias, then penalties, then masks, in vLLM's order.

    Args:
      tables: the rows' own.
      mask: i32[S, V/32], bits of the tokens that each row may sample in this step.
    """
    size, index = logits.shape[1], jnp.arange(len(logits))[:, None]
    on = rows.controlled[:, None]
    bias = jnp.where(on, tables.bias, 0.0)
    # A token has one bias; what repeats is padding, out of range. XLA need not add atomically.
    logits = logits.at[index, tables.bias_ids].add(bias, mode="drop", unique_indices=True)
    counts = tables.counts.astype(jnp.float32)
    penalty = rows.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(unpack_bits(tables.prompt, size) | (counts > 0), penalized, logits)
    logits = logits - rows.frequency_penalty[:, None] * counts - rows.presence_penalty[:, None] * (counts > 0)
    kept = jnp.where(on, tables.allowed, -1) & mask
    kept &= jnp.where(on & rows.before_min_tokens[:, None], ~tables.stops, -1)
    return jnp.where(unpack_bits(kept, size), logits, -jnp.inf)


def count_tokens(tables: ControlTables, slots: jax.Array, tokens: jax.Array) -> ControlTables:
    """Counts each sampled token i32[S] for its slot i32[S]; slots out of range are dropped."""
    before = tables.counts.at[slots, tokens].get(mode="clip")
    after = jnp.minimum(before, _MAX_COUNT - 1) + jnp.uint16(1)
    return tables._replace(counts=tables.counts.at[slots, tokens].set(after, mode="drop", unique_indices=True))


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def bitmask(ids: Sequence[int] | Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """i32[V/32] with the bits of `ids` set."""
    flags = np.zeros(32 * num_words(vocab_size), np.uint8)
    flags[np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def unpack_bits(words: jax.Array, size: int) -> jax.Array:
    """bool[S, size] from i32[S, size/32]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return bits.reshape(len(words), -1)[:, :size] > 0
