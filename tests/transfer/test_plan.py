import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Span
from penstock.core.types import BlockId
from penstock.transfer.plan import align, cut, num_blocks, span_array

ids = st.lists(st.integers(0, 40), max_size=60)


def align_naively(source_ids, destination_ids):
    spans = []
    for source, destination in zip(source_ids, destination_ids, strict=True):
        if spans:
            last = spans[-1]
            if (source, destination) == (last[0] + last[2], last[1] + last[2]):
                last[2] += 1
                continue
        spans.append([source, destination, 1])
    return [Span(*span) for span in spans]


@given(st.data())
def test_align_cuts_where_either_side_breaks(data):
    source_ids = data.draw(ids)
    destination_ids = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=60))
    count = min(len(source_ids), len(destination_ids))
    source_ids, destination_ids = source_ids[:count], destination_ids[:count]

    assert align(source_ids, destination_ids) == align_naively(source_ids, destination_ids)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_spans_are_bounded_by_the_runs_of_both_sides(source_runs, destination_runs):
    source_ids = blocks_in_runs(source_runs)
    destination_ids = blocks_in_runs(destination_runs)
    count = min(len(source_ids), len(destination_ids))

    spans = align(source_ids[:count], destination_ids[:count])

    assert len(spans) <= len(source_runs) + len(destination_runs) - 1
    assert num_blocks(spans) == count


def blocks_in_runs(lengths):
    """Lay runs out with a hole of one block between them."""
    block_ids, start = [], 0
    for length in lengths:
        block_ids += range(start, start + length)
        start += length + 1
    return block_ids


def test_one_run_on_both_sides_is_one_span():
    assert align(range(100, 10_100), range(7, 10_007)) == [Span(BlockId(100), BlockId(7), 10_000)]


def test_descending_blocks_are_not_a_run():
    assert len(align([3, 2, 1], [1, 2, 3])) == 3


@given(ids)
def test_an_array_of_spans_says_the_same(source_ids):
    destination_ids = source_ids[::-1]

    spans = align(source_ids, destination_ids)

    assert (span_array(spans) == cut(source_ids, destination_ids)).all()
    assert (span_array(spans) == cut(*map(np.array, (source_ids, destination_ids)))).all()


def test_ten_thousand_blocks_are_planned_in_a_millisecond():
    source_ids, destination_ids = (
        np.random.default_rng(seed).permutation(10_000) for seed in (1, 2)
    )

    def seconds() -> float:
        started = time.perf_counter()
        cut(source_ids, destination_ids)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(20)) < 1e-3
