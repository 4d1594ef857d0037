"""What is kept longer than its age says: shares, times to live, and what gives way to what."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.types import BlockHash
from penstock.kv.pool import BlockPool
from penstock.kv.retention import Retention


def names(count: int, kind: str = "n") -> list[BlockHash]:
    return [BlockHash(f"{kind}{index}".encode()) for index in range(count)]


def test_what_is_retained_is_forgotten_in_time() -> None:
    retention = Retention(100)
    first, second = names(2)
    assert retention.retain([first, second], 50) == 2
    assert retention.retain([second], 90) == 1
    assert retention.retain([first], 20) == 1  # not shortened
    retention.tell_time(49)
    assert [retention.strength(n) for n in (first, second)] == [1, 1]
    assert retention.remaining_ns(first) == 1
    retention.tell_time(50)
    assert [retention.strength(n) for n in (first, second)] == [0, 1]
    retention.tell_time(90)
    assert retention.is_empty


def test_more_than_a_share_is_declined_from_the_end_of_a_prefix() -> None:
    retention = Retention(8)
    wanted = names(6)
    assert retention.retain(wanted, 10) == 4
    assert [retention.strength(n) for n in wanted] == [1, 1, 1, 1, 0, 0]
    assert retention.pin("p", names(5, "p"), 10) == 2
    assert retention.pin("q", names(3, "p"), 20) == 2  # shared with the other pin
    assert retention.num_declined == 2 + 3 + 1
    retention.check()


def test_a_pin_ends_when_it_is_over_or_taken_back() -> None:
    retention = Retention(40)
    (name,) = names(1)
    retention.pin("a", [name], 10)
    retention.pin("b", [name], 30)
    assert retention.remaining_ns(name) == 30
    retention.unpin("b")
    retention.unpin("b")
    assert retention.strength(name) == 2
    retention.tell_time(10)
    assert retention.strength(name) == 0
    retention.pin("a", [name], 50)
    retention.pin("a", [], 50)
    assert retention.is_empty


def idle_pool(count: int) -> tuple[BlockPool, list[BlockHash]]:
    """A pool full of idle blocks, the first name let go first."""
    pool = BlockPool(count)
    pool.prefix_cache.retention = Retention(count)
    called = names(count)
    for name in called:
        (block_id,) = pool.allocate(1) or ()
        pool.insert(block_id, name)
    for name in called:
        block_id = pool.prefix_cache.find(name)
        assert block_id is not None
        pool.release([block_id])
    return pool, called


def left(pool: BlockPool, called: list[BlockHash]) -> list[BlockHash]:
    return [name for name in called if pool.prefix_cache.find(name) is not None]


def test_what_nobody_asked_for_goes_first_then_what_is_retained_and_pins_last() -> None:
    pool, called = idle_pool(8)
    retention = pool.prefix_cache.retention
    retention.pin("p", called[:2], 100)
    retention.retain(called[2:4], 100)
    assert pool.allocate(4)
    pool.check()
    assert left(pool, called) == called[:4]
    # A request that runs gets what it needs all the same.
    assert pool.allocate(2)
    assert left(pool, called) == called[:2]
    assert pool.allocate(2)
    assert left(pool, called) == []


def test_blocks_that_are_retained_are_not_given_up_for_long_runs_alone() -> None:
    pool, called = idle_pool(8)
    pool.prefix_cache.retention.retain(called[:4], 100)
    # Three times what is wanted become spare, but not of those.
    assert pool.allocate(2)
    assert [n for n in called if pool.prefix_cache.is_kept(find(pool, n))] == called[:4]


def test_when_the_time_is_over_age_decides_again() -> None:
    pool, called = idle_pool(8)
    retention = pool.prefix_cache.retention
    retention.retain(called[:4], 100)
    retention.tell_time(100)
    assert pool.allocate(1)
    assert pool.prefix_cache.is_spare(find(pool, called[1]))


def find(pool: BlockPool, name: BlockHash) -> int:
    block_id = pool.prefix_cache.find(name)
    return -1 if block_id is None else block_id


ACTS = st.tuples(
    st.sampled_from(["retain", "pin", "unpin", "time"]),
    st.integers(0, 3),
    st.integers(0, 12),
    st.integers(1, 40),
)


@given(st.lists(ACTS, max_size=60))
def test_shares_are_kept_and_nothing_outlives_its_time(acts: list[tuple[str, int, int, int]]):
    retention = Retention(16)
    wanted: dict[BlockHash, int] = {}
    now_ns = 0
    for act, kind, count, number in acts:
        prefix = names(count, str(kind))
        match act:
            case "retain":
                kept = prefix[: retention.retain(prefix, now_ns + number)]
            case "pin":
                kept = prefix[: retention.pin(f"p{kind}", prefix, now_ns + number)]
            case "unpin":
                retention.unpin(f"p{kind}")
                kept = []
            case _:
                now_ns += number
                retention.tell_time(now_ns)
                kept = []
        for name in kept:
            assert retention.strength(name) > 0
            wanted[name] = max(wanted.get(name, 0), now_ns + number)
        retention.check()
        assert all(u > now_ns or not retention.strength(n) for n, u in wanted.items())
        assert all(
            retention.remaining_ns(n) <= u - now_ns or u <= now_ns for n, u in wanted.items()
        )
