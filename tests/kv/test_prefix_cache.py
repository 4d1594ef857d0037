import pytest

from penstock.core.types import BlockHash
from penstock.kv.prefix_cache import PrefixCache


def named(name):
    return BlockHash(str(name).encode())


def with_idle(*block_ids):
    """Make a cache that keeps these blocks, let go of in this order."""
    cache = PrefixCache()
    for block_id in block_ids:
        cache.insert(block_id, named(block_id))
        cache.park(block_id)
    return cache


def test_gives_up_what_was_let_go_first():
    cache = with_idle(10, 20, 30)
    cache.unpark(10)
    cache.park(10)

    assert cache.give_up(2) == [20, 30]
    assert (cache.num_kept, cache.num_spare) == (1, 2)
    cache.check()


def test_gives_up_no_more_than_there_is():
    assert with_idle(1, 2).give_up(5) == [1, 2]


def test_a_spare_block_is_found_until_it_is_overwritten():
    cache = with_idle(1, 2, 3)
    cache.give_up(2)

    cache.forget([2, 7])

    assert cache.find(named(1)) == 1
    assert cache.find(named(2)) is None
    assert cache.is_spare(1)
    assert not cache.is_indexed(2)
    cache.check()


def test_a_hit_takes_a_spare_block_back():
    cache = with_idle(1, 2)
    cache.give_up(2)

    cache.unpark(1)
    cache.forget([1, 2])

    assert cache.find(named(1)) == 1
    assert not cache.is_idle(1)
    cache.check()


def test_a_kept_block_is_not_forgotten():
    cache = with_idle(1)

    cache.forget([1])

    assert cache.find(named(1)) == 1


def test_the_first_block_keeps_a_name():
    cache = PrefixCache()
    cache.insert(1, named("x"))
    cache.insert(2, named("x"))

    assert cache.find(named("x")) == 1
    assert not cache.is_indexed(2)


def test_a_block_without_a_name_cannot_wait_for_hits():
    with pytest.raises(AssertionError):
        PrefixCache().park(1)


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
