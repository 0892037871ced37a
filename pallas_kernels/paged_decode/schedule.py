"""How paged_decode's work is cut: the sequence of all blocks of keys, dealt out to CTAs in equal shares.

Which blocks a row needs is said once, in `Span`, for the arrays that XLA computes and for the kernel alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Span(NamedTuple):
    """Which blocks of keys a row needs: those that any of its queries sees.

    block    tokens of a block
    queries  of a row, the last of which is at position kv_len - 1
    window   how many keys a query sees, or None for all
    """

    block: int
    queries: int
    window: int | None

    def first_token(self, kv_len):
        """The first token that a query sees."""
        return 0 if self.window is None else jnp.maximum(kv_len - (self.queries - 1) - self.window, 0)

    def first(self, kv_len):
        """The row's first block."""
        return 0 if self.window is None else divide(self.first_token(kv_len), self.block)

    def count(self, kv_len):
        """How many blocks the row needs, `first` and those after it."""
        return divide(kv_len + (self.block - 1), self.block) - self.first(kv_len)

    def full(self, kv_len):
        """From which block and before which one every query sees every key. The first may be after the second."""
        start = 0
        if self.window is not None:
            start = divide(jnp.maximum(kv_len - self.window, 0) + (self.block - 1), self.block)
        return start, divide(jnp.maximum(kv_len - (self.queries - 1), 0), self.block)


def divide(x, n: int):
    """x // n of i32 that are not negative: lax.div, as what `//` does about signs is many instructions in a kernel."""
    return lax.div(x, jnp.full_like(x, n))


class Schedule(NamedTuple):
    """Who computes what.

    starts    i32[G, 5 + pages]: a CTA's first block (row, KV head, block within the row's span), that row's length,
              the number of blocks, and the page ids of the first
    next_row  i32[S], the next row in use
    shares    i32[2], (blocks of every CTA, how many CTAs have one more)
    """

    starts: jax.Array
    next_row: jax.Array
    shares: jax.Array


def cut(kv_lens, page_table, K: int, span: Span, page_tokens: int, G: int) -> Schedule:
    """The shares of G CTAs. Depends on no layer's arrays, so XLA computes it once for all layers of a step."""
    S = kv_lens.shape[0]
    rows = jnp.arange(S, dtype=jnp.int32)
    blocks = span.count(kv_lens)
    ends = row_ends(kv_lens, K, span)
    share, rest = ends[-1] // G, ends[-1] % G
    cta = jnp.arange(G, dtype=jnp.int32)
    begin = cta * share + jnp.minimum(cta, rest)
    row = jnp.minimum(jnp.sum(ends[None, :] <= begin[:, None], axis=1), S - 1)
    within = begin - (ends - blocks * K)[row]
    row_blocks = jnp.maximum(blocks[row], 1)
    block, kv_len = within % row_blocks, kv_lens[row]
    columns = jnp.arange(span.block // page_tokens, dtype=jnp.int32)
    ids = page_table[row[:, None], page_entry(span, block[:, None], columns, kv_len[:, None], page_tokens)]
    starts = jnp.stack([row, within // row_blocks, block, kv_len, share + (cta < rest), *ids.T], axis=1)
    in_use_later = (rows[None, :] > rows[:, None]) & (kv_lens > 0)[None, :]
    next_row = jnp.min(jnp.where(in_use_later, rows[None, :], S - 1), axis=1)
    return Schedule(
        starts.astype(jnp.int32), next_row.astype(jnp.int32), jnp.stack([share, rest]).astype(jnp.int32)
    )  # fmt: skip


def row_ends(kv_lens, K: int, span: Span):
    """i32[S]: where each row ends in the sequence of all blocks."""
    rows = jnp.arange(kv_lens.shape[0])
    return jnp.sum(jnp.where(rows[None, :] <= rows[:, None], span.count(kv_lens)[None, :], 0), axis=1) * K


def owner(index, share, rest):
    """The CTA that has the block of that index in the sequence of all blocks."""
    in_rest = rest * (share + 1)
    after = rest + lax.div(index - in_rest, jnp.maximum(share, 1))
    return jnp.where(index < in_rest, lax.div(index, share + 1), after)


def page_entry(span: Span, block, page, kv_len, page_tokens: int):
    """Where in the page table the id of a block's page is.

    Where no query sees any of the page's tokens, a page beside it is taken: the table may hold anything there.
    """
    pages = span.block // page_tokens
    entry = (span.first(kv_len) + block) * pages + page
    if span.window is not None:
        entry = jnp.maximum(entry, divide(span.first_token(kv_len), page_tokens))
    return jnp.minimum(entry, divide(jnp.maximum(kv_len, 1) - 1, page_tokens))
