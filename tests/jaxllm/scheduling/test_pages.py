"""PagePool against a model of it: held and free pages, reference counts, eviction order."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from jaxllm.scheduling.pages import OutOfPages, PagePool


class PoolMachine(RuleBasedStateMachine):
    """Holders take pages, share the pages of others or cached free ones, and release them."""

    holders = Bundle("holders")

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages):
        self.evicted, self.holdings = [], []
        self.pool = PagePool(num_pages, self.evicted.append)
        self.free = list(range(num_pages))  # in the order in which they shall be given out

    @rule(target=holders, count=st.integers(0, 5))
    def allocate(self, count):
        self.evicted.clear()
        if count > len(self.free):
            with pytest.raises(OutOfPages, match=f"{count} pages were asked for, {len(self.free)} of"):
                self.pool.allocate(count)
            assert self.evicted == []
            return []
        pages = self.pool.allocate(count)
        assert pages == self.evicted == self.free[:count]
        del self.free[:count]
        self.holdings.append(pages)
        return pages

    @rule(target=holders, pages=holders)
    def share_another_s(self, pages):
        return self._share([page for page in pages if not self.pool.is_free(page)])

    @rule(target=holders, data=st.data())
    def share_cached_free_pages(self, data):
        return self._share(data.draw(st.lists(st.sampled_from(self.free), unique=True)) if self.free else [])

    def _share(self, pages):
        self.evicted.clear()
        self.pool.share(pages)
        assert self.evicted == []  # their content stays
        self.free = [page for page in self.free if page not in pages]
        self.holdings.append(list(pages))
        return list(pages)

    @rule(pages=consumes(holders))
    def release(self, pages):
        if pages not in self.holdings:
            return  # of an allocation that failed
        self.holdings.remove(pages)
        self.pool.release(pages)
        held = Counter(page for holding in self.holdings for page in holding)
        self.free += [page for page in reversed(pages) if not held[page]]

    @invariant()
    def holds(self):
        self.pool.check(self.holdings)
        assert self.pool.num_free == len(self.free)
        assert list(self.pool._free) == self.free
        assert all(self.pool.is_free(page) == (page in self.free) for page in range(self.pool.num_pages))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_the_least_recently_freed_is_evicted_first_and_an_end_before_its_beginning():
    pool = PagePool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6) == [5, 4, 3, 2, 1, 0]


def test_releasing_what_nobody_holds():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="page 0 was released, but nobody holds it"):
        pool.release(pages)


def test_a_pool_has_pages():
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PagePool(0)


@pytest.mark.parametrize("holdings", [[], [[0], [0]], [[0, 1]], [[1]]])
def test_check_finds_what_is_wrong(holdings):
    pool = PagePool(3)
    pool.allocate(1)
    pool.check([[0]])
    with pytest.raises(AssertionError, match="references and"):
        pool.check(holdings)
