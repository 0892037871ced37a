"""PagePool: which KV pages are free, who holds the others. It knows nothing of tokens or requests.

A page is in exactly one of two states: *held* (reference count > 0) or *free* (count 0). A free page may still carry KV
that the prefix cache can hand out again; so the free pages stand in eviction order, least recently freed first, and
whoever is told through `on_evict` forgets a page's content when the pool takes it for new tokens.

        free, in eviction order                    held
    [7 (cached)] [2] [9 (cached)] ...       [0 x1] [1 x3] [4 x1] ...
      ^ allocate() takes from here      release() puts at the end of free ^
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """Reference-counted pages 0..num_pages-1 (PagedAttention, Kwon et al., SOSP 2023).

    Args:
      num_pages: the number of pages, at least 1.
      on_evict: called with a page's id just before its old content is given up.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._ref_counts = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give out, those with cached content included."""
        return len(self._free)

    def is_free(self, page: int) -> bool:
        return self._ref_counts[page] == 0

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages with a reference count of 1; raises OutOfPages, taking none, if there are fewer."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages were asked for, {len(self._free)} of {self.num_pages} are free")
        pages = []
        for _ in range(count):
            page, _none = self._free.popitem(last=False)
            self._on_evict(page)
            self._ref_counts[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a holder to each page; one that was free (its content cached) is held again."""
        for page in pages:
            if self._ref_counts[page] == 0:
                del self._free[page]
            self._ref_counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drops a holder of each page, last page first: a sequence's end is to be evicted before its beginning."""
        for page in reversed(pages):
            if self._ref_counts[page] <= 0:
                raise ValueError(f"page {page} was released, but nobody holds it")
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._free[page] = None

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Asserts invariant I2: every page is free or held, and is held as often as `holdings` say."""
        held = Counter(page for pages in holdings for page in pages)
        for page, count in enumerate(self._ref_counts):
            assert count == held[page], f"page {page} has {count} references and {held[page]} holders"
            free = page in self._free
            assert (count == 0) == free, f"page {page} has {count} references; free: {free}"
        assert len(self._free) + sum(count > 0 for count in self._ref_counts) == self.num_pages
