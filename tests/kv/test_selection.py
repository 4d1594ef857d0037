"""Which slots are kept: windows by arithmetic, SnapKV by what the last queries look at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.selection import (
    runs_of,
    snap_scores,
    snap_slots,
    streaming_blocks,
    streaming_slots,
)


def test_a_window_keeps_the_sinks_and_the_latest():
    assert streaming_slots(20, num_sinks=4, window=6).tolist() == [0, 1, 2, 3, *range(14, 20)]
    assert streaming_slots(3, num_sinks=4, window=6).tolist() == [0, 1, 2]
    assert streaming_slots(9, num_sinks=4, window=6).tolist() == list(range(9))
    assert streaming_slots(9, num_sinks=0, window=2).tolist() == [7, 8]


@given(
    num_tokens=st.integers(1, 200),
    block_size=st.sampled_from([1, 4, 16]),
    num_sinks=st.integers(0, 20),
    window=st.integers(1, 60),
)
def test_whole_blocks_cover_the_window_and_little_more(num_tokens, block_size, num_sinks, window):
    num_blocks = -(-num_tokens // block_size)
    front, end = streaming_blocks(
        num_blocks, block_size=block_size, num_sinks=num_sinks, window=window
    )
    slots = streaming_slots(num_tokens, num_sinks=num_sinks, window=window)
    assert len(set(slots.tolist())) == len(slots) <= num_sinks + window
    kept = [*front, *end]
    assert kept == sorted(set(kept))
    assert set((slots // block_size).tolist()) <= set(kept)
    # At most a part of a block more on either side of the two.
    assert len(kept) * block_size < num_sinks + window + 3 * block_size
    assert set(kept) <= set(range(num_blocks))


def attention(num_heads, num_queries, num_tokens, looked_at):
    """Return weights, nearly all of them on the slots named per head."""
    weights = np.full((num_heads, num_queries, num_tokens), 1e-4, np.float32)
    for head, slots in enumerate(looked_at):
        weights[head][:, slots] = 1.0
    return weights / weights.sum(2, keepdims=True)


def test_each_kv_head_keeps_what_its_queries_look_at():
    weights = attention(4, 3, 40, [[5], [20], [30], [30]])
    scores = snap_scores(weights, 2, kernel_size=1)
    assert scores.shape == (2, 37)
    slots = snap_slots(scores, 40, capacity=5)
    # Heads 0 and 1 share the first KV head. The slots of the queries themselves stay.
    assert slots[0].tolist() == [5, 20, 37, 38, 39]
    assert slots[1].tolist() == [0, 30, 37, 38, 39]


def test_what_surrounds_an_important_slot_stays_with_it():
    scores = snap_scores(attention(1, 2, 30, [[12]]), 1, kernel_size=5)
    assert snap_slots(scores, 30, capacity=7)[0].tolist() == [10, 11, 12, 13, 14, 28, 29]
    # At either end there are fewer neighbours, and none from the other end.
    scores = snap_scores(attention(1, 2, 30, [[0]]), 1, kernel_size=5)
    assert snap_slots(scores, 30, capacity=5)[0].tolist() == [0, 1, 2, 28, 29]


def test_scores_are_means_over_queries_and_heads():
    rng = np.random.default_rng(0)
    weights = rng.random((6, 4, 25)).astype(np.float32)
    scores = snap_scores(weights, 3, kernel_size=1)
    for head in range(3):
        wanted = weights[2 * head : 2 * head + 2, :, :21].mean((0, 1))
        np.testing.assert_allclose(scores[head], wanted, rtol=1e-5)


@given(st.data())
def test_selections_are_ascending_distinct_and_the_best(data):
    num_kv_heads, num_recent = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    num_past = data.draw(st.integers(0, 60))
    capacity = num_recent + data.draw(st.integers(1, 40))
    # Few different scores, so that many are equal.
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.integers(0, 4, (num_kv_heads, num_past)).astype(np.float32)
    num_tokens = num_past + num_recent
    slots = snap_slots(scores, num_tokens, capacity=capacity)
    assert slots.shape == (num_kv_heads, min(capacity, num_tokens))
    for head, kept in enumerate(slots):
        assert (np.diff(kept) > 0).all()
        past = kept[kept < num_past]
        assert len(kept) - len(past) == num_recent
        ranked = sorted(range(num_past), key=lambda slot: (-scores[head, slot], slot))
        assert past.tolist() == sorted(ranked[: len(past)])
        assert [slot for run in runs_of(kept) for slot in run] == kept.tolist()


def test_runs_are_what_a_gather_copies():
    assert runs_of(np.array([0, 1, 2, 7, 9, 10])) == [range(3), range(7, 8), range(9, 11)]
    assert runs_of(np.array([], np.int64)) == []


def test_what_selects_nothing_is_refused():
    weights = attention(3, 2, 10, [[1]])
    with pytest.raises(ValueError, match="3 heads over 2"):
        snap_scores(weights, 2)
    with pytest.raises(ValueError, match="odd"):
        snap_scores(weights, 3, kernel_size=4)
    with pytest.raises(ValueError, match="2 recent slots in a capacity of 2"):
        snap_slots(snap_scores(weights, 3), 10, capacity=2)
    with pytest.raises(ValueError, match="window of 0"):
        streaming_slots(9, num_sinks=4, window=0)
    with pytest.raises(ValueError, match="window of 0"):
        streaming_blocks(9, block_size=16, num_sinks=4, window=0)
