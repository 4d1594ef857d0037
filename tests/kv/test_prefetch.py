"""Prefetch queue: the order of wishes, and one outcome for each."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.prefetch import PrefetchBooks, PrefetchQueue


def make(depth: int = 10, horizon_ns: int = 1000) -> PrefetchQueue:
    return PrefetchQueue(depth=depth, horizon_ns=horizon_ns)


def test_the_earliest_first_within_depth_and_horizon():
    queue = make(depth=2, horizon_ns=100)
    for key, deadline_ns in [("far", 500), ("b", 90), ("a", 50), ("c", 95)]:
        assert queue.expect(key, deadline_ns)
    assert queue.take(0) == ("a", 50)
    assert queue.take(0) == ("b", 90)
    assert queue.take(0) is None  # two are coming
    queue.arrive("a")
    assert queue.take(0) == ("c", 95)
    queue.arrive("b")
    assert queue.take(0) is None  # 500 is too far ahead
    assert queue.take(400) == ("far", 500)


def test_an_earlier_deadline_counts_and_a_later_one_does_not():
    queue = make()
    queue.expect("a", 100)
    queue.expect("b", 50)
    queue.expect("a", 10)
    queue.expect("b", 500)
    assert [queue.take(0), queue.take(0), queue.take(0)] == [("a", 10), ("b", 50), None]


def test_outcomes():
    queue = make(depth=3)
    for key in ("used", "wasted", "late", "missed", "dropped"):
        queue.expect(key, 100)
    for _ in range(3):
        assert queue.take(0)
    queue.arrive("used")
    queue.arrive("wasted")
    for key in ("used", "late", "missed", "never wished for"):
        queue.need(key)
    queue.lose("wasted")
    queue.lose("dropped")
    assert queue.books == PrefetchBooks(used=1, late=1, missed=1, wasted=1, dropped=1)
    assert len(queue) == 0


def test_put_back_is_taken_again():
    queue = make(depth=1)
    queue.expect("a", 5)
    assert queue.take(0) == ("a", 5)
    queue.put_back("a")
    assert queue.take(0) == ("a", 5)
    queue.need("a")
    queue.expect("b", 6)
    assert queue.take(0) == ("b", 6)


@given(st.data())
def test_every_wish_has_one_outcome(data):
    queue, coming, num_wishes, open_wishes = make(depth=3), set(), 0, set()
    for _ in range(data.draw(st.integers(0, 60))):
        key = data.draw(st.integers(0, 6))
        match data.draw(st.sampled_from(["expect", "take", "arrive", "need", "lose", "back"])):
            case "expect":
                num_wishes += key not in open_wishes
                open_wishes.add(key)
                queue.expect(key, data.draw(st.integers(0, 50)))
            case "take" if (wish := queue.take(0)) is not None:
                assert wish[0] in open_wishes - coming
                coming.add(wish[0])
                assert len(coming) <= 3
            case "arrive":
                queue.arrive(key)
                coming.discard(key)
            case "back" if key in coming:
                queue.put_back(key)
                coming.remove(key)
            case "need" | "lose" as act:
                getattr(queue, act)(key)
                open_wishes.discard(key)
                coming.discard(key)
    books = queue.books
    outcomes = books.used + books.late + books.missed + books.wasted + books.dropped
    assert outcomes + len(queue) == num_wishes
    assert len(queue) == len(open_wishes)
