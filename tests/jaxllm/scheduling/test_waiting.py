"""WaitingQueue: sorted by rank, first come first served among equals."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.scheduling.request import Request
from jaxllm.scheduling.waiting import WaitingQueue


def request(name, rank) -> Request:
    one = Request(str(name), np.ones(1, np.int32), 1)
    one.rank = rank
    return one


def ids(queue) -> list[str]:
    return [one.id for one in queue]


def test_an_empty_queue():
    queue = WaitingQueue()
    assert len(queue) == 0 and queue.head is None and ids(queue) == []


def test_newcomers_at_the_end_the_preempted_at_the_front_others_between():
    queue = WaitingQueue()
    for name, rank in (("b", 2), ("d", 4), ("a", 1), ("c", 3), ("c2", 3), ("a2", 1), ("d2", 4)):
        queue.add(request(name, rank))
    assert ids(queue) == ["a", "a2", "b", "c", "c2", "d", "d2"] and queue.head.id == "a"


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 100))))
def test_it_is_a_stable_sort(operations):
    queue, expected = WaitingQueue(), []
    for i, (rank, removes, which) in enumerate(operations):
        if removes and expected:
            gone = expected.pop(which % len(expected))
            queue.remove(gone)
        else:
            one = request(i, rank)
            queue.add(one)
            expected = sorted([*expected, one], key=lambda other: other.rank)
        assert ids(queue) == [one.id for one in expected]
        assert len(queue) == len(expected) and queue.head is (expected[0] if expected else None)


def test_removing_takes_that_very_request():
    """Requests are compared by identity: two of one rank, even of one id, are two."""
    queue, one, other = WaitingQueue(), request("a", 1), request("a", 1)
    queue.add(one)
    queue.add(other)
    queue.remove(other)
    assert list(queue) == [one]
