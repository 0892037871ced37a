"""KVMemory: pages for the residents' tokens, from the pool and from the prefix cache. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.scheduling.pages import PagePool
from jaxllm.scheduling.prefix_cache import PrefixCache
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.residents import Ints, Residents


class KVMemory:
    """The page pool and the prefix cache together, in terms of requests and tokens.

    Attributes:
      page_size: tokens a page.
      queried_tokens, hit_tokens: prompt tokens looked up on first admission, and those of them that were found.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool, residents: Residents) -> None:
        self.page_size = page_size
        self.cache: PrefixCache | None = PrefixCache() if prefix_caching else None
        self.pool = PagePool(num_pages, self.cache.forget if self.cache is not None else lambda page: None)
        self.queried_tokens = self.hit_tokens = 0
        self._residents = residents

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, request: Request) -> list[int]:
        """Cached pages of a waiting request's beginning; always leaves it at least one token to compute."""
        # Once it has an answer, what its prompt was computed in whole for has been done.
        skipped = request.skip_reading_prefix_cache and not request.output_token_ids
        if self.cache is None or skipped:
            return []
        count = (request.num_tokens - 1) // self.page_size
        keys = request.pages_of_tokens(count, self.page_size)
        return self.cache.match(self.cache.root(request.cache_salt), keys)

    def num_free_without(self, pages: Sequence[int]) -> int:
        """Pages that would be free once `pages` were held."""
        return self.pool.num_free - sum(self.pool.is_free(page) for page in pages)

    def begin(self, request: Request, hits: list[int]) -> None:
        """Gives a request that has just become resident the cached pages of its beginning."""
        residents, slot = self._residents, request.slot
        self.pool.share(hits)
        residents.append_pages(np.array([slot]), np.array([len(hits)]), hits)
        residents.computed[slot] = len(hits) * self.page_size
        residents.cached_pages[slot] = len(hits)
        if self.cache is not None:
            residents.cache_uid[slot] = self.cache.uid(hits[-1]) if hits else self.cache.root(request.cache_salt)
        if request.first_scheduled_at is None:
            request.num_cached_tokens = len(hits) * self.page_size
            self.queried_tokens += request.prompt_len
            self.hit_tokens += request.num_cached_tokens

    def grow(self, slots: Ints, counts: Ints) -> None:
        """Allocates counts[i] more pages to slots[i], in this order; OutOfPages, taking none, if they are not free."""
        total = int(counts.sum())
        if total:
            self._residents.append_pages(slots, counts, self.pool.allocate(total))

    def publish(self, slots: Ints) -> None:
        """Offers the slots' full pages of known tokens to the prefix cache.

        Pages that a planned step is going to fill count as full: within a layer, KV is written before it is read, so
        even a request admitted to the same step may use them.
        """
        if self.cache is None:
            return
        r = self._residents
        full = np.minimum(r.computed[slots], r.total[slots] - r.pending[slots]) // self.page_size
        fresh = np.flatnonzero(full > r.cached_pages[slots])
        if not len(fresh):
            return
        slots, full = slots[fresh], full[fresh]
        first, uids = r.cached_pages[slots].tolist(), r.cache_uid[slots].tolist()
        for i, (request, end) in enumerate(zip(r.requests_of(slots), full.tolist(), strict=True)):
            keys, uid = request.pages_of_tokens(end, self.page_size), uids[i]
            for column, page in enumerate(r.pages[request.slot, first[i] : end].tolist(), first[i]):
                uid = self.cache.insert(page, uid, keys[column])
            uids[i] = uid
        r.cached_pages[slots], r.cache_uid[slots] = full, uids

    def check(self) -> None:
        """Asserts that pages and holders agree, and that every resident's computed tokens lie in its pages (I2, I3)."""
        r = self._residents
        self.pool.check([r.pages[slot, : r.num_pages[slot]].tolist() for slot in r.order.tolist()])
        assert np.all(r.num_pages[r.order] * self.page_size >= r.computed[r.order])
        assert np.all(r.computed[r.order] <= r.total[r.order])
