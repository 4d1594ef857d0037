"""Which blocks are kept: windows by arithmetic, SnapKV by what the last queries look at."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv.selection import OBSERVED_TOKENS, snap_blocks, snap_scores, streaming_blocks


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
    wanted = {*range(min(num_sinks, num_tokens)), *range(max(0, num_tokens - window), num_tokens)}
    kept = [*front, *end]
    assert kept == sorted(set(kept))
    assert {slot // block_size for slot in wanted} <= set(kept)
    # At most a part of a block more on either side of the two.
    assert len(kept) * block_size < num_sinks + window + 3 * block_size
    assert set(kept) <= set(range(num_blocks))


def attention(num_heads, num_queries, num_tokens, looked_at):
    """Return weights, nearly all of them on the slots named per head."""
    weights = np.full((num_heads, num_queries, num_tokens), 1e-4, np.float32)
    for head, slots in enumerate(looked_at):
        weights[head][:, slots] = 1.0
    return weights / weights.sum(2, keepdims=True)


def test_each_kv_head_scores_what_its_queries_look_at():
    scores = snap_scores(attention(4, 3, 40, [[5], [20], [30], [30]]), 2, kernel_size=1)
    assert scores.shape == (2, 37)
    # Heads 0 and 1 share the first KV head.
    assert sorted(np.argsort(-scores[0])[:2].tolist()) == [5, 20]
    assert int(scores[1].argmax()) == 30


def test_what_surrounds_an_important_slot_stays_with_it():
    (scores,) = snap_scores(attention(1, 2, 30, [[12]]), 1, kernel_size=5)
    assert np.flatnonzero(scores == scores.max()).tolist() == [10, 11, 12, 13, 14]
    # At either end there are fewer neighbours, and none from the other end.
    (scores,) = snap_scores(attention(1, 2, 30, [[0]]), 1, kernel_size=5)
    assert np.flatnonzero(scores == scores.max()).tolist() == [0, 1, 2]


def test_scores_are_means_over_queries_and_heads():
    rng = np.random.default_rng(0)
    weights = rng.random((6, 4, 25)).astype(np.float32)
    scores = snap_scores(weights, 3, kernel_size=1)
    for head in range(3):
        wanted = weights[2 * head : 2 * head + 2, :, :21].mean((0, 1))
        np.testing.assert_allclose(scores[head], wanted, rtol=1e-5)


@given(st.data())
def test_the_first_block_the_last_tokens_and_the_best_are_kept(data):
    block_size = data.draw(st.sampled_from([1, 4, 16, 32]))
    num_tokens = data.draw(st.integers(OBSERVED_TOKENS + 1, 600))
    capacity = data.draw(st.integers(1, 600))
    num_blocks = -(-num_tokens // block_size)
    # Few different scores, so that many are equal.
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.integers(0, 4, num_blocks).astype(float).tolist()
    gaps = snap_blocks(scores, num_tokens, block_size=block_size, capacity_tokens=capacity)
    let_go = [entry for gap in gaps for entry in gap]
    assert all(a.stop < b.start for a, b in pairwise(gaps))
    assert all(gaps)
    first_recent = (num_tokens - OBSERVED_TOKENS) // block_size
    assert all(0 < entry < first_recent for entry in let_go)
    choice = [entry for entry in range(1, first_recent) if entry not in let_go]
    num_always = 1 + num_blocks - max(1, first_recent)
    room = max(0, -(-capacity // block_size) - num_always)
    assert len(choice) == min(room, max(0, first_recent - 1))
    ranked = sorted(range(1, first_recent), key=lambda entry: (-scores[entry], entry))
    assert choice == sorted(ranked[: len(choice)])


def test_a_prompt_that_fits_is_kept_whole():
    assert snap_blocks([0.0] * 8, 120, block_size=16, capacity_tokens=128) == ()
    assert snap_blocks([0.0] * 8, 120, block_size=16, capacity_tokens=112) == (range(5, 6),)


def test_what_selects_nothing_is_refused():
    weights = attention(3, 2, 10, [[1]])
    with pytest.raises(ValueError, match="3 heads over 2"):
        snap_scores(weights, 2)
    with pytest.raises(ValueError, match="odd"):
        snap_scores(weights, 3, kernel_size=4)
    with pytest.raises(ValueError, match="window of 0"):
        streaming_blocks(9, block_size=16, num_sinks=4, window=0)
