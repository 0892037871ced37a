"""A CTA's share of the blocks of keys, in a kernel: walked in order, with page ids asked for one block ahead."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl
from pallas_kernels.paged_decode.schedule import divide, page_entry


class Share:
    """What `schedule.cut` dealt out to one CTA.

    Args:
      index: of the share.
      sizes: has S, num_ctas, span and pages (of a block).
      inputs: references to `table`, `lens` and the schedule's arrays.
      heads: of a row, to each of which all of its blocks belong.
      page_tokens: of a page.
    """

    def __init__(self, index, sizes, inputs, *, heads, page_tokens):
        self.index, self.sizes, self.inputs = index, sizes, inputs
        self.heads, self.page_tokens = heads, page_tokens
        start = [inputs.starts[index, i] for i in range(5 + sizes.pages)]
        self.row, self.head, self.block, self.kv_len, self.count = start[:5]
        self.page_ids = tuple(start[5:])

    def next_segment(self, row, head):
        last = head == self.heads - 1
        return jnp.where(last, self.inputs.next_row[row], row), jnp.where(last, 0, head + 1)

    def for_each_block(self, body):
        """Calls body(i, head, page ids) on the share's blocks, of which it is the i-th."""

        def step(i, state):
            row, head, block, kv_len, ids = state
            at_end = block + 1 == self.sizes.span.count(kv_len)
            next_row, next_head = self.next_segment(row, head)
            next_row, next_head = jnp.where(at_end, next_row, row), jnp.where(at_end, next_head, head)
            next_block, next_len = jnp.where(at_end, 0, block + 1), self.inputs.lens[next_row]
            # Asked for now, used one step later: the table is far away.
            next_ids = self._ids_of(next_row, next_block, next_len)
            body(i, head, ids)
            return next_row, next_head, next_block, next_len, next_ids

        lax.fori_loop(0, self.count, step, (self.row, self.head, self.block, self.kv_len, self.page_ids))

    def _ids_of(self, row, block, kv_len):
        entries = [
            page_entry(self.sizes.span, block, page, kv_len, self.page_tokens) for page in range(self.sizes.pages)
        ]
        return tuple(self.inputs.table[row, entry] for entry in entries)

    def for_each_unused_row(self, body):
        """Calls body(row) on every num_ctas-th row that is not in use."""
        sizes = self.sizes

        def step(i, _):
            row = self.index + i * sizes.num_ctas
            pl.when(self.inputs.lens[row] == 0)(lambda: body(row))

        lax.fori_loop(0, divide(sizes.S - self.index + (sizes.num_ctas - 1), sizes.num_ctas), step, None)
