"""Eviction orders: each gives up what its rule says, and never what it does not have."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.eviction import ORDERS, ArcOrder, CostOrder, LruOrder, make_order


def anything(key: object) -> bool:
    return True


def evict(order) -> object:
    key = order.victim(anything)
    order.remove(key, evicted=True)
    return key


def hits(name: str, accesses: list[int], capacity: int) -> int:
    """Return the hits of a cache of so many blocks."""
    order, present, count = make_order(name), set(), 0
    for key in accesses:
        if key in present:
            order.touch(key)
            count += 1
            continue
        if len(present) == capacity:
            present.remove(evict(order))
        order.insert(key, 1.0)
        present.add(key)
    return count


def test_lru_gives_up_the_longest_unused_that_may_go():
    order = LruOrder()
    for key in "abc":
        order.insert(key, 1.0)
    order.touch("a")
    assert order.victim(lambda key: key != "b") == "c"
    assert [evict(order) for _ in range(3)] == ["b", "c", "a"]
    assert order.victim(anything) is None


def test_cost_prefers_what_is_dear_and_what_is_used_often():
    order = CostOrder()
    order.insert("cheap", 1.0)
    order.insert("dear", 10.0)
    order.insert("often", 1.0)
    for _ in range(4):
        order.touch("often")
    assert [evict(order) for _ in range(2)] == ["cheap", "often"]
    # What went was worth 5: newcomers start from there, so an old dear block can be outlived.
    order.insert("new", 6.0)
    assert evict(order) == "dear"


def test_cost_skips_what_is_held_and_finds_it_again():
    order = CostOrder()
    order.insert("held", 1.0)
    order.insert("free", 2.0)
    assert order.victim(lambda key: key != "held") == "free"
    assert order.victim(anything) == "held"


def test_arc_is_not_flushed_by_a_scan_and_lru_is():
    hot = list(range(8))
    accesses: list[int] = []
    for round_ in range(30):
        accesses += hot * 2 + list(range(1000 + 40 * round_, 1000 + 40 * round_ + 16))
    assert hits("arc", accesses, 16) > hits("lru", accesses, 16)


def test_arc_learns_from_ghosts():
    order = ArcOrder()
    for key in "abcd":
        order.insert(key, 1.0)
    order.touch("a")
    assert evict(order) == "b"
    order.insert("b", 1.0)  # its ghost is here: used again, and the list of new ones too short
    assert order.victim(anything) == "c"
    order.remove("c", evicted=False)
    assert order.victim(anything) in ("d", "a")


class _Lru:
    """The oracle."""

    def __init__(self, capacity: int) -> None:
        self.keys: OrderedDict[int, None] = OrderedDict()
        self.capacity = capacity

    def access(self, key: int) -> bool:
        is_hit = key in self.keys
        self.keys[key] = None
        self.keys.move_to_end(key)
        if len(self.keys) > self.capacity:
            self.keys.popitem(last=False)
        return is_hit


@given(st.lists(st.integers(0, 12), max_size=120), st.integers(1, 8))
def test_lru_is_lru(accesses, capacity):
    oracle = _Lru(capacity)
    assert hits("lru", accesses, capacity) == sum(oracle.access(key) for key in accesses)


@pytest.mark.parametrize("name", ORDERS)
@given(data=st.data())
def test_a_victim_is_always_in_and_allowed(name, data):
    order, present = make_order(name), set()
    for _ in range(data.draw(st.integers(0, 60))):
        key = data.draw(st.integers(0, 9))
        act = data.draw(st.sampled_from(["use", "use", "drop", "evict"]))
        if act == "evict":
            held = data.draw(st.sets(st.integers(0, 9), max_size=5))
            victim = order.victim(lambda key: key not in held)  # noqa: B023
            assert (victim is None) == (present <= held)
            if victim is not None:
                assert victim in present - held
                order.remove(victim, evicted=True)
                present.remove(victim)
        elif act == "drop" and key in present:
            order.remove(key, evicted=False)
            present.remove(key)
        elif key in present:
            order.touch(key)
        else:
            order.insert(key, data.draw(st.floats(0.1, 100)))
            present.add(key)
