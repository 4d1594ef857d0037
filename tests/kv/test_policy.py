"""Decisions by cost: each is the cheapest of what it could have been."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.policy import (
    Cut,
    Option,
    Temperature,
    choose_codec,
    choose_tier,
    fetch_beside_computing,
    fetch_then_recompute,
    steady_ns,
    temperature_of,
)
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier

CODECS = [
    CodecSpec(name=RAW, block_bytes=64),
    CodecSpec(name="int8", block_bytes=32, decode_ns=10, loss=0.001),
    CodecSpec(name="int4", block_bytes=16, decode_ns=40, loss=0.01),
]


def link(bytes_per_ns: float, latency_ns: float = 0, num_queues: int = 1) -> LinkSpec:
    return LinkSpec(
        source=Tier.DRAM,
        destination=Tier.HBM,
        latency_ns=latency_ns,
        bytes_per_ns=bytes_per_ns,
        num_queues=num_queues,
    )


@pytest.mark.parametrize(
    ("bytes_per_ns", "loss_max", "num_lanes", "expected"),
    [
        (0.1, 0.01, 1, "int4"),  # a slow link: the bytes decide
        (0.1, 0.001, 1, "int8"),  # int4 is beyond the budget
        (0.1, 0.0, 1, RAW),  # exact
        (2.0, 0.01, 1, "int8"),  # 32, 16 and 40 ns: decoding int4 is what takes longest
        (2.0, 0.01, 8, "int4"),  # unless there are lanes enough
        (100.0, 0.01, 1, RAW),  # a fast link: decoding anything costs more
    ],
)
def test_codec_by_link_lanes_and_budget(bytes_per_ns, loss_max, num_lanes, expected):
    codec = choose_codec(CODECS, link(bytes_per_ns), loss_max=loss_max, num_lanes=num_lanes)
    assert codec.name == expected


def test_no_codec_within_the_budget_is_an_error():
    with pytest.raises(ValueError, match="within a loss"):
        choose_codec(CODECS[1:], link(1.0), loss_max=0.0)


def test_latency_is_shared_by_neighbours_and_queues():
    slow = link(1.0, latency_ns=90, num_queues=3)
    assert steady_ns(CODECS[0], slow, 1, 1.0) == 64 + 30
    assert steady_ns(CODECS[0], slow, 1, 3.0) == 64 + 10


@given(
    st.integers(0, 40),
    st.floats(0, 50),
    st.floats(0.1, 20),
    st.floats(0.1, 20),
    st.floats(0, 2),
)
def test_the_cut_is_the_best_of_all_ends(num_blocks, latency_ns, per_fetch, per_compute, growth):
    def fetch_ns(n: int) -> float:
        return latency_ns + per_fetch * n

    def recompute_ns(n: int) -> float:
        return per_compute * n + growth * n * n

    def total_ns(n: int) -> float:
        return (fetch_ns(n) if n else 0.0) + recompute_ns(num_blocks - n)

    ends = range(num_blocks)
    cut = fetch_then_recompute(num_blocks, fetch_ns, recompute_ns, ends=ends)
    assert cut.total_ns == pytest.approx(total_ns(cut.num_fetched))
    assert cut.total_ns == pytest.approx(min(map(total_ns, range(num_blocks + 1))))


@pytest.mark.parametrize(("uses", "expected"), [(0.5, "cold"), (1.5, "warm"), (2.0, "hot")])
def test_how_warm_a_block_is_by_its_expected_uses(uses, expected):
    assert temperature_of(uses, save_ns=100, write_ns=100).value == expected


def test_where_writing_is_free_it_has_to_save_something():
    assert temperature_of(0.1, save_ns=1, write_ns=0) is Temperature.HOT
    assert temperature_of(0.1, save_ns=-1, write_ns=0) is Temperature.COLD
    assert temperature_of(0.0, save_ns=1, write_ns=0) is Temperature.COLD


def test_tier_by_gain_and_room():
    near = Option(Tier.DRAM, fetch_ns=10, write_ns=20, free_bytes=64)
    far = Option(Tier.DISK, fetch_ns=70, write_ns=5, free_bytes=10**9)

    def choose(uses: float, options=(near, far), num_bytes: int = 64) -> Tier | None:
        return choose_tier(options, recompute_ns=100, expected_uses=uses, num_bytes=num_bytes)

    assert choose(1.0) is Tier.DRAM  # 70 against 25
    assert choose(0.2) is Tier.DISK  # -2 against 1
    assert choose(1.0, num_bytes=65) is Tier.DISK
    assert choose(0.1) is None
    assert choose(1.0, options=()) is None


def test_a_prefix_is_fetched_as_far_as_that_is_quicker_than_computing_after_it() -> None:
    def fetch_ns(count: int) -> float:
        """Four blocks lie near, the others far."""
        return count * 10.0 + max(0, count - 4) * 1000.0

    def cut(num_blocks: int, block_ns: float) -> int:
        found = fetch_then_recompute(num_blocks, fetch_ns, lambda n: n * block_ns, ends=[4])
        total_ns = (fetch_ns(found.num_fetched)) + (num_blocks - found.num_fetched) * block_ns
        assert found.total_ns == total_ns
        return found.num_fetched

    assert [cut(10, block_ns) for block_ns in (5.0, 10.0, 100.0, 5000.0)] == [0, 0, 4, 10]
    assert cut(0, 100.0) == 0


def test_beside_computing_the_end_is_fetched_that_takes_as_long_as_the_front():
    def fetch_ns(num_blocks):
        return 50 + 10 * num_blocks

    def compute_ns(num_blocks):
        return 10 * num_blocks

    assert fetch_beside_computing(20, fetch_ns, compute_ns) == Cut(8, 130)
    for num_blocks in range(1, 30):
        best = min(
            max(fetch_ns(n) if n else 0, compute_ns(num_blocks - n)) for n in range(num_blocks + 1)
        )
        assert fetch_beside_computing(num_blocks, fetch_ns, compute_ns).total_ns == best


def test_what_is_fetched_at_once_is_not_computed_and_what_never_comes_is():
    assert fetch_beside_computing(9, lambda n: 1.0, lambda n: 5.0 * n) == Cut(9, 1.0)
    assert fetch_beside_computing(9, lambda n: 1e9 * n, lambda n: 5.0 * n) == Cut(0, 45.0)
