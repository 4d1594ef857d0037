import pytest

from penstock.core.types import BlockHash
from penstock.kv.prefix_cache import LOOK_AHEAD, PrefixCache


def named(name):
    return BlockHash(str(name).encode())


def chain(cache, block_ids, name="chain"):
    """Index a chain of blocks, root first, and let go of it as the pool does: leaf first."""
    hashes = [named(f"{name}-{i}") for i in range(len(block_ids))]
    for i, block_id in enumerate(block_ids):
        cache.insert(block_id, hashes[i], hashes[i - 1] if i else None)
    for block_id in reversed(block_ids):
        cache.park(block_id)
    return hashes


def touches_nothing(block_id):
    return False


def test_evicts_what_was_let_go_first():
    cache = PrefixCache()
    for block_id in (10, 20, 30):
        cache.insert(block_id, named(block_id))
        cache.park(block_id)
    cache.unpark(10)
    cache.park(10)

    assert cache.evict(2, touches_nothing) == [20, 30]
    assert cache.find(named(20)) is None
    assert cache.find(named(10)) == 10
    cache.check()


def test_prefers_a_block_that_joins_a_free_segment():
    cache = PrefixCache()
    for block_id in (10, 20, 30):
        cache.insert(block_id, named(block_id))
        cache.park(block_id)

    assert cache.evict(1, lambda block_id: block_id == 30) == [30]


def test_looks_only_a_little_ahead_for_neighbours():
    cache = PrefixCache()
    block_ids = [3 * i for i in range(LOOK_AHEAD + 5)]
    for block_id in block_ids:
        cache.insert(block_id, named(block_id))
        cache.park(block_id)

    assert cache.evict(1, lambda block_id: block_id == block_ids[LOOK_AHEAD]) == [0]
    assert cache.evict(1, lambda block_id: block_id == block_ids[LOOK_AHEAD]) == [
        block_ids[LOOK_AHEAD]
    ]


def test_a_chain_is_evicted_from_its_leaf_and_stays_useful():
    cache = PrefixCache()
    hashes = chain(cache, [5, 6, 7, 8])

    assert cache.evict(2, touches_nothing) == [8, 7]
    assert cache.longest_prefix(hashes, 4) == 2
    cache.check()


def test_a_parent_is_spared_even_when_it_would_join_a_free_segment():
    cache = PrefixCache()
    chain(cache, [5, 20])

    assert cache.evict(1, lambda block_id: block_id == 5) == [20]


def test_a_parent_goes_when_only_its_child_is_in_use():
    cache = PrefixCache()
    cache.insert(1, named("parent"))
    cache.insert(2, named("child"), named("parent"))
    cache.park(1)

    assert cache.evict(1, touches_nothing) == [1]
    cache.check()


def test_evicted_neighbours_make_one_run():
    cache = PrefixCache()
    # Two requests grew by turns, so that their blocks alternate; both were let go.
    chain(cache, [0, 2, 4, 6], "even")
    chain(cache, [1, 3, 5, 7], "odd")

    assert sorted(cache.evict(4, touches_nothing)) == [4, 5, 6, 7]


def test_the_first_block_keeps_a_name():
    cache = PrefixCache()
    cache.insert(1, named("x"))
    cache.insert(2, named("x"))

    assert cache.find(named("x")) == 1
    assert not cache.is_indexed(2)


def test_a_block_without_a_name_cannot_wait_for_hits():
    with pytest.raises(AssertionError):
        PrefixCache().park(1)


def test_evicting_more_than_is_idle_is_a_bug():
    cache = PrefixCache()
    cache.insert(1, named(1))

    with pytest.raises(AssertionError):
        cache.evict(1, touches_nothing)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({0, 1, 2, 3, 4, 5}, 6),
        ({4, 5}, 6),
        ({3, 4}, 5),
        ({0, 2, 4}, 1),
        ({1, 3, 5}, 0),
        (set(), 0),
    ],
)
def test_a_window_needs_only_the_end_of_a_prefix(present, expected):
    cache = PrefixCache()
    hashes = [named(i) for i in range(6)]
    for i in present:
        cache.insert(i, hashes[i])

    assert cache.longest_window(hashes, 6, lambda n: max(0, n - 2)) == expected
