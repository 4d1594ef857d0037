"""The reuse study: distances and hits against plain models, the bound, and the worth of a tier."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import BadRequest
from penstock.sim.profile import StepTimes
from penstock.sim.reuse import (
    POLICIES,
    PrefixRequest,
    PrefixTrace,
    ReuseTier,
    hits,
    lru_hits,
    read_prefixes,
    stack_distances,
    tier_value,
)

TIMES = StepTimes(a=1.0, b=0.1, c=0.0, d=0, e=0, f=0)


def trace(*requests: tuple[int, ...], block_tokens: int = 10) -> PrefixTrace:
    return PrefixTrace(
        "t", block_tokens, [PrefixRequest(block_tokens * len(r) + 1, r) for r in requests]
    )


def test_distances_count_different_blocks_since_the_last_use():
    distances = stack_distances(trace((1, 2), (3,), (1, 2), (3, 4), (1,)))
    # Blocks are touched from the end: after (1, 2) the stack is 1, 2; after (3,) 3, 1, 2.
    assert distances == [[None, None], [None], [1, 2], [2, None], [2]]


@st.composite
def prefix_traces(draw) -> PrefixTrace:
    """Draw prompts that are paths of a small tree, as prefix-chained names are."""
    names: dict[tuple[int, ...], int] = {}
    requests = []
    for _ in range(draw(st.integers(1, 25))):
        path = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=5)))
        parts = [path[: i + 1] for i in range(len(path))]
        requests.append(tuple(names.setdefault(part, len(names)) for part in parts))
    return trace(*requests)


@given(prefix_traces(), st.integers(1, 20))
def test_lru_by_distances_is_lru_by_simulation(drawn, capacity):
    assert lru_hits(stack_distances(drawn), capacity) == hits(drawn, "lru", capacity)


@given(prefix_traces(), st.integers(1, 20))
def test_nobody_beats_belady(drawn, capacity):
    bound = hits(drawn, "belady", capacity)
    for policy in POLICIES:
        assert hits(drawn, policy, capacity) <= bound
    assert bound <= drawn.num_blocks - drawn.num_unique


@given(prefix_traces())
def test_with_room_for_all_every_policy_hits_all_that_comes_back(drawn):
    for policy in POLICIES:
        assert hits(drawn, policy, drawn.num_unique) == drawn.num_blocks - drawn.num_unique


def test_belady_keeps_what_comes_back_soonest():
    scan = trace((1,), (2,), (3,), (1,), (2,), (3,), (1,), (2,), (3,))
    assert hits(scan, "lru", 2) == 0
    assert hits(scan, "belady", 2) == 4


def test_a_tier_is_worth_what_it_saves():
    conversation = trace((1, 2, 3, 4), (9,), (1, 2, 3, 4))
    distances = stack_distances(conversation)

    def value(*tiers: ReuseTier):
        return tier_value(conversation, distances, tiers, times=TIMES, block_bytes=1000)

    def tier(name: str, blocks: int, ms_per_block: float) -> ReuseTier:
        return ReuseTier(
            name=name,
            capacity_blocks=blocks,
            bytes_per_ns=1000 / (ms_per_block * 1e6),
            latency_ns=0,
        )

    # 41 tokens take 1 + 4.1 ms, 11 tokens 1 + 1.1 ms.
    assert value().mean_ms == pytest.approx((5.1 + 2.1 + 5.1) / 3)
    near = tier("near", 2, 1e-9)
    assert value(near).hit_rate == pytest.approx(1 / 9)  # block 1: one other was used since
    everything = tier("all", 100, 1e-9)
    assert value(everything).mean_ms == pytest.approx((5.1 + 2.1 + 1.1) / 3)
    # One block lies near; the three after it are sooner computed than fetched, or just not.
    parted = value(tier("none", 0, 1), tier("near", 2, 1e-9), tier("tape", 100, 1.5))
    assert parted.num_parted == 1
    assert parted.mean_ms == pytest.approx((5.1 + 2.1 + 1.1 + 3.0) / 3)
    fetched = value(tier("none", 0, 1), tier("near", 2, 1e-9), tier("tape", 100, 0.9))
    assert fetched.num_parted == 0
    assert fetched.mean_ms == pytest.approx((5.1 + 2.1 + 1.1 + 2.7) / 3)
    # Fetching takes for ever: it is computed, and the tier costs nothing.
    useless = value(tier("none", 0, 1), tier("tape", 100, 1e6))
    assert useless.mean_ms == pytest.approx(value().mean_ms)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_trace_is_read_and_its_block_size_found(tmp_path, is_compressed):
    rows = [
        {"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1, "input_length": 512, "output_length": 5, "hash_ids": [0]},
    ]
    text = "\n".join(map(json.dumps, rows)).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(gzip.compress(text) if is_compressed else text)
    read = read_prefixes(path)
    assert read.block_tokens == 512
    assert [r.names for r in read.requests] == [(0, 1), (0,)], "a partial block is nobody's"


def test_a_trace_that_names_full_blocks_only(tmp_path):
    rows = [
        {"input_length": 31, "hash_ids": [0]},
        {"input_length": 175, "hash_ids": list(range(10))},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_prefixes(path)
    assert read.block_tokens == 16
    assert [len(r.names) for r in read.requests] == [1, 10]


@pytest.mark.parametrize("text", ["", "[]\n", '{"input_length": 3}\n', "\n\n"])
def test_what_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(BadRequest):
        read_prefixes(path)
