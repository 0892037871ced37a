"""Drives a network through StepBatches as a runner would, with Python lists instead of a scheduler.

rows = Stepper(network, params, page_size=4)
a = rows.add([5, 1, 7])
rows.step({a: 2})            # the first two prompt tokens
logits = rows.step({a: 1})   # {a: [V] after the last one}
rows.append(a, 9)            # a sampled token, computed by the next step
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models import LayerKV, Network, StepBatch


@dataclass
class Row:
    tokens: list[int]
    prompt_len: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class Stepper:
    """Page ids come from a shuffled free list, the page table's unused entries are out of range, and the pages start
    full of garbage: a network that reads what it should not read is found out."""

    def __init__(self, network: Network, params, *, page_size: int = 4, num_pages: int = 64, table_width: int = 32):
        self.network, self.params = network, params
        self.page_size, self.num_pages, self.table_width = page_size, num_pages, table_width
        self.rows: list[Row] = []
        random = np.random.default_rng(0)
        self.free = list(map(int, random.permutation(num_pages)))
        self.kv = tuple(
            LayerKV(*(shape and jnp.asarray(100 * random.standard_normal(shape), network.dtype) for shape in shapes))
            for shapes in network.kv_shapes(num_pages, page_size)
        )
        self._run = jax.jit(self._forward)

    def add(self, prompt: list[int]) -> int:
        self.rows.append(Row(list(prompt), len(prompt)))
        return len(self.rows) - 1

    def append(self, row: int, token: int) -> None:
        self.rows[row].tokens.append(int(token))

    def step(self, counts: dict[int, int], *, decode_only: bool = False, pad: int = 0) -> dict[int, np.ndarray]:
        """Compute `counts[row]` further tokens of each row -> the logits [V] after each row's last one.

        Rows past their prompt become decode rows. `pad` tokens and as many rows of padding are added.
        """
        order = sorted(counts, key=lambda row: not self._is_decode(row))
        batch = self._batch(order, counts, sum(map(self._is_decode, order)), decode_only, pad)
        last = np.cumsum([counts[row] for row in order]) - 1
        logits, self.kv = self._run(self.params, self.kv, batch, jnp.asarray(last, jnp.int32))
        for row in order:
            self.rows[row].computed += counts[row]
        return dict(zip(order, np.asarray(logits), strict=True))

    def _is_decode(self, row: int) -> bool:
        return self.rows[row].computed >= self.rows[row].prompt_len

    def _forward(self, params, kv, batch, last):
        hidden, kv = self.network.forward(params, kv, batch)
        return self.network.logits(params, hidden[last]), kv

    def _batch(self, order, counts, num_decodes, decode_only, pad) -> StepBatch:
        num_tokens, num_rows = sum(counts.values()) + pad, len(order) + pad
        token_ids, positions, seq_ids = (np.zeros(num_tokens, np.int32) for _ in range(3))
        slots = np.full(num_tokens, self.num_pages * self.page_size, np.int32)
        page_table = np.full((num_rows, self.table_width), 10**6, np.int32)
        kv_lens, prompt_lens = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
        query_starts = np.zeros(num_rows + 1, np.int32)
        at = 0
        for i, row_id in enumerate(order):
            row, count = self.rows[row_id], counts[row_id]
            end = row.computed + count
            assert end <= len(row.tokens), "more tokens than the row has"
            while len(row.pages) * self.page_size < end:
                row.pages.append(self.free.pop())
            here, there = slice(at, at + count), np.arange(row.computed, end)
            token_ids[here], positions[here], seq_ids[here] = row.tokens[row.computed : end], there, i
            slots[here] = np.asarray(row.pages)[there // self.page_size] * self.page_size + there % self.page_size
            page_table[i, : len(row.pages)] = row.pages
            kv_lens[i], prompt_lens[i] = end, row.prompt_len
            at += count
            query_starts[i + 1] = at
        query_starts[len(order) + 1 :] = at
        arrays = (token_ids, positions, seq_ids, slots, page_table, kv_lens, query_starts, prompt_lens)
        return StepBatch(*map(jnp.asarray, arrays), jnp.int32(num_decodes), decode_only=decode_only)


def greedy(stepper: Stepper, row: int, logits: np.ndarray, num_tokens: int) -> list[int]:
    """The `num_tokens` most likely tokens after `logits`, computed one decode step at a time."""
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens:
        stepper.append(row, tokens[-1])
        tokens.append(int(stepper.step({row: 1}, decode_only=True)[row].argmax()))
    return tokens
