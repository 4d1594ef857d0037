"""The fair queue: priorities, shares of keys, and what it forgets."""

from penstock.control.queue import KEYS_MAX, FairQueue
from penstock.control.record import RequestRecord
from tests.control.story import request


def record(name: str, num_prompt: int = 10, key: str = "", priority: int = 0) -> RequestRecord:
    return RequestRecord(request(name, num_prompt, fairness_key=key, priority=priority), 0)


def served(queue: FairQueue, count: int) -> str:
    names = []
    for _ in range(count):
        first = queue.first()
        assert first is not None
        queue.take(first)
        queue.check()
        names.append(first.request_id)
    return " ".join(names)


def test_one_key_is_served_in_turn() -> None:
    queue = FairQueue()
    for name in "abc":
        queue.add(record(name))
    assert served(queue, 3) == "a b c"
    assert queue.first() is None


def test_a_key_that_floods_does_not_starve_another() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.add(record(f"flood{number}", key="greedy"))
    assert served(queue, 3) == "flood0 flood1 flood2"
    for number in range(3):
        queue.add(record(f"m{number}", key="modest"))
    assert served(queue, 6) == "m0 flood3 m1 flood4 m2 flood5"


def test_shares_are_in_tokens() -> None:
    queue = FairQueue()
    for number in range(4):
        queue.add(record(f"long{number}", 40, key="a"))
    for number in range(8):
        queue.add(record(f"short{number}", 10, key="b"))
    order = served(queue, 10).split()
    assert order.index("short3") < order.index("long1")
    assert order.index("long1") < order.index("short7")


def test_a_more_urgent_priority_goes_first_and_the_least_urgent_is_given_up_first() -> None:
    queue = FairQueue()
    for name, priority in (("low", 9), ("mid", 0), ("late", 9), ("high", -1)):
        queue.add(record(name, priority=priority))
    last = queue.last()
    assert last is not None
    assert last.request_id == "late"
    assert queue.tokens_before(0) == 20
    assert served(queue, 4) == "high mid low late"


def test_who_leaves_is_gone_and_the_heap_does_not_grow() -> None:
    queue = FairQueue()
    kept = record("kept", priority=5)
    queue.add(kept)
    for number in range(1000):
        gone = record(f"r{number}")
        queue.add(gone)
        queue.discard(gone)
        queue.discard(gone)
    queue.check()
    assert len(queue._heap) < 100
    assert queue.num_tokens == 10
    assert queue.first() is kept


def test_keys_that_have_nothing_left_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(2 * KEYS_MAX):
        one = record(f"r{number}", key=f"k{number}")
        queue.add(one)
        queue.take(one)
        marker = record(f"s{number}", 20, key="steady")
        queue.add(marker)
        queue.take(marker)
    assert len(queue._finish) <= KEYS_MAX + 2
