"""A step's inputs: packed by the host into one i32 vector, so that a step is one transfer; unpacked on the device.

    [ num_tokens num_rows num_decodes 0 | rows [S, row width] | page updates [U, 2] | token ids [T] ]

Everything else that a network wants (positions, KV slots, page-table rows, ...) follows from these and from two arrays
that stay on the device: the page table and the last token of every slot. So the host sends only what changed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.interface import StepBatch
from jaxllm.runner.sampler import SamplingRows, SamplingTable, ends
from jaxllm.runner.shapes import StepShape
from jaxllm.scheduling.plan import StepPlan

_HEADER = 4
# slot, num_tokens, kv_len, samples, prompt_len; then the sampling parameters. Of a decode-only shape, num_tokens is in
# how many of the steps in a row the row takes part, and kv_len its length in the first.
_ROW = 5
ROW_WIDTH = _ROW + SamplingTable.width
NO_ENTRY = np.iinfo(np.int32).max  # an index that is always out of range, and dropped


class DeviceState(NamedTuple):
    """What stays on the device between steps, one row a slot."""

    page_table: jax.Array  # i32[max_num_seqs, W]
    last_token: jax.Array  # i32[max_num_seqs]

    def with_last_tokens(self, slots: jax.Array, tokens: jax.Array) -> "DeviceState":
        return self._replace(last_token=self.last_token.at[slots].set(tokens, mode="drop"))


class UnpackedStep(NamedTuple):
    batch: StepBatch
    last_positions: jax.Array  # i32[S] index in [0, T) of each row's last token
    rows: jax.Array  # i32[S, row width] the packed rows, for the sampler
    state: DeviceState  # with the page updates applied


class UnpackedRows(NamedTuple):
    """What the sampler reads of a step's rows."""

    slots: jax.Array  # i32[S] where each row's new token goes; out of range for rows that don't sample, or take no part
    sampling: SamplingRows
    own_slots: jax.Array  # i32[S] the slot of every row; out of range for padding

    @classmethod
    def of(cls, rows: jax.Array, max_num_seqs: int, kv_lens: jax.Array | None = None) -> "UnpackedRows":
        """`kv_lens` i32[S] are those of a loop's step; None: as packed."""
        slots, _, packed_lens, samples, prompt_lens = (rows[:, i] for i in range(_ROW))
        kv_lens = packed_lens if kv_lens is None else kv_lens
        sampling = SamplingRows.unpack(rows[:, _ROW:], kv_lens, prompt_lens)
        return cls(jnp.where((samples > 0) & (kv_lens > 0), slots, max_num_seqs), sampling, slots)


@dataclass(frozen=True)
class InputLayout:
    """Where what lies in the packed vector of one shape; the host side and the device side both read it here."""

    shape: StepShape
    page_size: int
    max_num_seqs: int
    max_pages: int

    @property
    def num_updates(self) -> int:
        """Page-table entries that one step carries: what rows may need for new tokens, and for some decode steps more.

        Where there are more, the others go ahead of the step.
        """
        return 2 * self.shape.num_rows + self.shape.num_tokens // self.page_size

    @property
    def size(self) -> int:
        return _HEADER + self.shape.num_rows * ROW_WIDTH + 2 * self.num_updates + self.shape.num_tokens

    def pack(self, plan: StepPlan, sampling: SamplingTable, updates: np.ndarray) -> np.ndarray:
        """i32[size]. `updates` [U, 2] are (flat page-table index, page), at most num_updates of them."""
        packed = np.zeros(self.size, np.int32)
        num_rows, width = len(plan.slots), ROW_WIDTH
        packed[:3] = len(plan.tokens), num_rows, plan.num_decodes
        start = _HEADER
        rows = packed[start : start + self.shape.num_rows * width].reshape(self.shape.num_rows, width)
        rows[:num_rows, 0] = plan.slots
        rows[num_rows:, 0] = self.max_num_seqs
        rows[:num_rows, 1] = plan.num_tokens
        rows[:num_rows, 2] = plan.starts + (1 if self.shape.decode_only else plan.num_tokens)
        rows[:num_rows, 3] = plan.samples
        rows[:num_rows, 4] = sampling.prompt_len[plan.slots]
        rows[:num_rows, _ROW:] = sampling.rows[plan.slots]
        start += rows.size
        entries = packed[start : start + 2 * self.num_updates].reshape(-1, 2)
        entries[: len(updates)] = updates
        entries[len(updates) :, 0] = NO_ENTRY
        start += entries.size
        packed[start : start + len(plan.tokens)] = plan.tokens
        return packed

    def unpack(self, packed: jax.Array, state: DeviceState, num_pages: int) -> UnpackedStep:
        """The step's batch, on the device. `num_pages` is the size of the KV pool."""
        state = self.update_page_table(packed, state)
        if self.shape.decode_only:
            return self.unpack_decode(packed, state, num_pages, step=0)
        T, num_tokens = self.shape.num_tokens, packed[0]
        rows, _, token_ids = self._split(packed)
        slots, counts, kv_lens = rows[:, 0], rows[:, 1], rows[:, 2]
        query_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
        index = jnp.arange(T, dtype=jnp.int32)
        seq_ids = _row_of_token(query_starts, T)
        positions = jnp.maximum(kv_lens - counts, 0)[seq_ids] + index - query_starts[seq_ids]
        in_flight = state.last_token.at[slots[seq_ids]].get(mode="clip")
        token_ids = jnp.where(token_ids < 0, in_flight, token_ids)
        batch = self._batch(
            rows, state, num_pages, in_use=index < num_tokens, token_ids=token_ids, positions=positions,
            seq_ids=seq_ids, kv_lens=kv_lens, query_starts=query_starts, num_decodes=packed[2],
        )  # fmt: skip
        return UnpackedStep(batch, jnp.maximum(query_starts[1:] - 1, 0), rows, state)

    def unpack_decode(self, packed: jax.Array, state: DeviceState, num_pages: int, step: int | jax.Array):
        """The same for the `step`-th of a decode-only shape's steps in a row, whose page updates are done.

        In a loop a row whose newest token is a stop token takes no part: it writes no KV, attends to nothing and keeps
        its last token, by which loops after this one know it too, until the host has seen that it has ended.
        """
        rows, _, token_ids = self._split(packed)
        in_flight = state.last_token.at[rows[:, 0]].get(mode="clip")
        fed_back = (token_ids < 0) | (step > 0)
        takes_part = step < rows[:, 1]
        if self.shape.num_steps > 1:
            takes_part &= ~(fed_back & ends(rows[:, _ROW:], in_flight))
        kv_lens = jnp.where(takes_part, rows[:, 2] + step, 0)
        token_ids = jnp.where(fed_back, in_flight, token_ids)
        index = jnp.arange(self.shape.num_rows, dtype=jnp.int32)
        batch = self._batch(
            rows, state, num_pages, in_use=takes_part, token_ids=token_ids, positions=kv_lens - 1, seq_ids=index,
            kv_lens=kv_lens, query_starts=jnp.arange(self.shape.num_rows + 1, dtype=jnp.int32), num_decodes=packed[2],
        )  # fmt: skip
        return UnpackedStep(batch, index, rows, state)

    def update_page_table(self, packed: jax.Array, state: DeviceState) -> DeviceState:
        return write_page_table(state, self._split(packed)[1])

    def _split(self, packed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """rows [S, row width], page updates [U, 2], token ids [T]."""
        S = self.shape.num_rows
        parts = jnp.split(packed[_HEADER:], np.cumsum([S * ROW_WIDTH, 2 * self.num_updates]))
        return parts[0].reshape(S, -1), parts[1].reshape(-1, 2), parts[2]

    def _batch(self, rows, state, num_pages, *, in_use, token_ids, positions, seq_ids, **fields) -> StepBatch:
        page_table = state.page_table.at[rows[:, 0]].get(mode="fill", fill_value=0)
        pages = page_table[seq_ids, jnp.clip(positions // self.page_size, 0, self.max_pages - 1)]
        padding = num_pages * self.page_size + jnp.arange(len(token_ids), dtype=jnp.int32)
        kv_slots = jnp.where(in_use, pages * self.page_size + positions % self.page_size, padding)
        return StepBatch(
            token_ids=jnp.where(in_use, token_ids, 0),
            positions=jnp.where(in_use, positions, 0),
            seq_ids=seq_ids,
            slots=jax.lax.optimization_barrier(kv_slots),  # or XLA computes them anew in each layer
            page_table=page_table,
            prompt_lens=rows[:, 4],
            decode_only=self.shape.decode_only,
            **fields,
        )


def write_page_table(state: DeviceState, entries: jax.Array) -> DeviceState:
    """Writes entries i32[U, 2] of (flat index, page); those with index NO_ENTRY are padding."""
    table = state.page_table.reshape(-1).at[entries[:, 0]].set(entries[:, 1], mode="drop")
    return DeviceState(table.reshape(state.page_table.shape), state.last_token)


def _row_of_token(query_starts: jax.Array, num_tokens: int) -> jax.Array:
    """i32[T] from i32[S + 1]: how many rows begin at or before each token, less one. Padding goes to the last row."""
    begins = jnp.zeros(num_tokens, jnp.int32).at[query_starts[1:-1]].add(1, mode="drop")
    return jnp.minimum(jnp.cumsum(begins, dtype=jnp.int32), len(query_starts) - 2)


def page_table_entries(plan: StepPlan, max_pages: int) -> np.ndarray:
    """The plan's page updates as i64[U, 2]: (flat index into the page table, page)."""
    updates = plan.page_updates
    entries = np.empty((len(updates), 2), np.int64)
    entries[:, 0], entries[:, 1] = updates[:, 0] * max_pages + updates[:, 1], updates[:, 2]
    return entries
