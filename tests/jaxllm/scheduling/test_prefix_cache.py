"""PrefixCache: equal beginnings are found, different ones never, even if every hash were equal."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.scheduling.prefix_cache import ROOT, PrefixCache


def insert(cache, sequence, pages, root=ROOT):
    uid = root
    for page, tokens in zip(pages, sequence, strict=True):
        uid = cache.insert(page, uid, tokens)
    return uid


def test_the_longest_known_beginning():
    cache = PrefixCache()
    insert(cache, [b"a", b"b", b"c"], [5, 6, 7])
    assert cache.match(ROOT, [b"a", b"b", b"c", b"d"]) == [5, 6, 7]
    assert cache.match(ROOT, [b"a", b"b", b"x", b"c"]) == [5, 6]
    assert cache.match(ROOT, [b"b", b"c"]) == cache.match(ROOT, []) == []
    assert len(cache) == 3


def test_equal_pages_after_different_beginnings_are_different():
    cache = PrefixCache()
    insert(cache, [b"a", b"same"], [0, 1])
    insert(cache, [b"b", b"same"], [2, 3])
    assert cache.match(ROOT, [b"a", b"same"]) == [0, 1]
    assert cache.match(ROOT, [b"b", b"same"]) == [2, 3]


def test_the_first_page_of_equal_content_stays():
    cache = PrefixCache()
    uid = insert(cache, [b"a", b"b"], [0, 1])
    assert insert(cache, [b"a", b"b"], [2, 3]) == uid == cache.uid(1)
    assert cache.match(ROOT, [b"a", b"b"]) == [0, 1] and len(cache) == 2
    cache.forget(2)  # which was never cached
    assert cache.match(ROOT, [b"a", b"b"]) == [0, 1]


def test_what_hangs_on_a_forgotten_page_is_never_found_again():
    cache = PrefixCache()
    insert(cache, [b"a", b"b"], [0, 1])
    cache.forget(0)
    assert cache.match(ROOT, [b"a", b"b"]) == []
    insert(cache, [b"a"], [2])  # the same beginning in another page: what followed the old one may not be its own
    assert cache.match(ROOT, [b"a", b"b"]) == [2]
    cache.forget(1)
    cache.forget(1)
    assert len(cache) == 1


def test_a_page_with_new_content_loses_its_old_one():
    cache = PrefixCache()
    insert(cache, [b"a"], [0])
    insert(cache, [b"b"], [0])
    assert cache.match(ROOT, [b"a"]) == [] and cache.match(ROOT, [b"b"]) == [0] and len(cache) == 1


def test_salts_share_nothing():
    cache = PrefixCache()
    roots = [cache.root(salt) for salt in ("", "x", "y")]
    assert roots[0] == ROOT and len(set(roots)) == 3 and cache.root("x") == roots[1]
    for page, root in enumerate(roots[:2]):
        insert(cache, [b"a"], [page], root)
    assert [cache.match(root, [b"a"]) for root in roots] == [[0], [1], []]


def test_clear():
    cache = PrefixCache()
    root = cache.root("x")
    before = insert(cache, [b"a"], [0], root)
    cache.clear()
    assert len(cache) == 0 and cache.match(root, [b"a"]) == []
    assert insert(cache, [b"a"], [0], root) != before  # a uid is never used twice


class Colliding(bytes):
    """Tokens of which all have the same hash."""

    __slots__ = ()

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return bytes.__eq__(self, other)


def test_equal_hashes_are_no_equal_tokens():
    cache = PrefixCache()
    one, other = Colliding(b"one"), Colliding(b"other")
    assert hash(one) == hash(other)
    insert(cache, [one, one], [0, 1])
    assert cache.match(ROOT, [other]) == [] and cache.match(ROOT, [one, other]) == [0]
    insert(cache, [other, one], [2, 3])
    assert cache.match(ROOT, [one, one]) == [0, 1] and cache.match(ROOT, [other, one]) == [2, 3]


@settings(max_examples=100, deadline=None)
@given(
    operations=st.lists(
        st.tuples(
            st.lists(st.sampled_from([Colliding(b"a"), Colliding(b"b")]), max_size=4),  # a sequence, to be cached
            st.lists(st.integers(0, 9), max_size=3),  # pages to be evicted after it
        ),
        max_size=12,
    )
)
def test_a_hit_always_holds_what_was_asked_for(operations):
    """Pages remember the whole sequence up to their end, as KV does: a match must give back exactly that."""
    cache, contents, now_cached = PrefixCache(), {}, set()
    for sequence, evicted in operations:
        hits = cache.match(ROOT, sequence)
        for column, page in enumerate(hits):
            assert contents[page] == sequence[: column + 1]
        uid = cache.uid(hits[-1]) if hits else ROOT
        for column in range(len(hits), len(sequence)):
            page = next((page for page in range(10) if page not in now_cached), None)
            if page is None:
                break
            contents[page] = sequence[: column + 1]
            uid = cache.insert(page, uid, sequence[column])
            now_cached.add(page)
        assert cache.match(ROOT, sequence)[: len(hits)] == hits
        for page in evicted:
            cache.forget(page)
            now_cached.discard(page)
        assert len(cache) == len(now_cached)
