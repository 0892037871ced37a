"""Residents: the running numbers of the requests that own a slot, one column an array, one row a slot.

A step advances hundreds of requests by one token each; as columns that is a handful of NumPy operations, as objects it
would be the slowest part of the engine's host code.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from jaxllm.scheduling.request import IntArray, Request, State

Ints = npt.NDArray[np.int64]


class Residents:
    """Columns over slots 0..max_num_seqs-1; `order` lists the slots in use, in admission order.

    Columns (i64[max_num_seqs] unless said otherwise):
      computed: tokens whose KV is in the pages, counted when scheduled.
      total: tokens known plus tokens in flight (sampled by a step whose result has not been seen).
      pending: tokens in flight.
      limit: `total` at which the request ends for length.
      min_total: `total` below which no stop token ends it.
      prompt_len, num_pages, cached_pages (full pages already offered to the prefix cache).
      sent_pages: pages that the device's page table knows; cache_uid: what the prefix cache calls the last cached page.
      last_token: the newest token seen.
      generation: counts a slot's tenancies, so that a late result can tell that its request is gone.
      stepwise: bool[max_num_seqs], see Request.
      pages: i32[max_num_seqs, max_pages], the page ids of each row, valid up to num_pages.
      stop_ids: i32[max_num_seqs, width], padded with -1.
    """

    def __init__(self, max_num_seqs: int, max_pages: int) -> None:
        def column(fill: int = 0) -> Ints:
            return np.full(max_num_seqs, fill, np.int64)

        self.computed, self.total, self.pending = column(), column(), column()
        self.limit, self.min_total, self.prompt_len = column(), column(), column()
        self.num_pages, self.cached_pages, self.generation = column(), column(), column()
        self.last_token, self.cache_uid, self.sent_pages = column(-1), column(), column()
        self.stepwise = np.zeros(max_num_seqs, np.bool_)
        self.pages: IntArray = np.zeros((max_num_seqs, max_pages), np.int32)
        self.stop_ids: IntArray = np.full((max_num_seqs, 4), -1, np.int32)
        self.requests: list[Request | None] = [None] * max_num_seqs
        self.order: Ints = np.zeros(0, np.int64)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_free(self) -> int:
        return len(self._free_slots)

    def in_order(self) -> list[Request]:
        """The resident requests, in admission order."""
        return self.requests_of(self.order)

    def add(self, request: Request, limit: int) -> int:
        """Gives the request a slot and fills its row; the caller has made sure that one is free."""
        slot = self._free_slots.pop()
        request.slot, request.state, request._residents = slot, State.RESIDENT, self
        self.requests[slot] = request
        self.computed[slot] = self.pending[slot] = self.num_pages[slot] = 0
        self.cached_pages[slot] = self.sent_pages[slot] = 0
        self.total[slot], self.limit[slot] = request.num_tokens, limit
        self.prompt_len[slot], self.stepwise[slot] = request.prompt_len, request.stepwise
        self.min_total[slot] = request.prompt_len + request.min_new_tokens
        self.last_token[slot] = request.output_token_ids[-1] if request.output_token_ids else request.prompt[-1]
        self._set_stop_ids(slot, sorted(request.stop_token_ids))
        self.order = np.append(self.order, slot)
        return slot

    def remove(self, request: Request) -> list[int]:
        """Frees the request's slot and returns the pages that it held; its state is the caller's to set."""
        slot = request.slot
        pages: list[int] = self.pages[slot, : self.num_pages[slot]].tolist()
        self.num_pages[slot] = self.pending[slot] = 0
        self.generation[slot] += 1
        self.order = self.order[self.order != slot]
        self.requests[slot] = None
        self._free_slots.append(slot)
        request.slot, request._residents = -1, None
        return pages

    def take_page_updates(self, slots: Ints) -> Ints:
        """The page-table entries of these slots that no plan has carried yet: i64[U, 3] of (slot, column, page)."""
        behind = slots[self.num_pages[slots] > self.sent_pages[slots]]
        rows, columns = _cells(behind, self.sent_pages[behind], self.num_pages[behind] - self.sent_pages[behind])
        self.sent_pages[behind] = self.num_pages[behind]
        updates = np.empty((len(rows), 3), np.int64)
        updates[:, 0], updates[:, 1], updates[:, 2] = rows, columns, self.pages[rows, columns]
        return updates

    def append_pages(self, slots: Ints, counts: Ints, pages: list[int]) -> None:
        """Appends counts[i] of `pages` to slots[i], in this order."""
        self.pages[_cells(slots, self.num_pages[slots], counts)] = pages
        self.num_pages[slots] += counts

    def requests_of(self, slots: Ints) -> list[Request]:
        """The requests in these slots, all of which are in use."""
        return cast(list[Request], list(map(self.requests.__getitem__, slots.tolist())))

    def _set_stop_ids(self, slot: int, ids: list[int]) -> None:
        if len(ids) > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), 2 * len(ids)), -1, np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = ids


def _cells(slots: Ints, starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Rows and columns of the cells (slots[i], starts[i] ... starts[i] + counts[i] - 1), one slot after the other."""
    rows = np.repeat(slots, counts)
    columns = np.arange(len(rows)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return rows, columns
