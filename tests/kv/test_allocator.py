import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.kv.allocator import SegmentAllocator, run_lengths, split_runs

NUM_BLOCKS = 48
counts = st.integers(1, NUM_BLOCKS + 2)


class AllocatorMachine(RuleBasedStateMachine):
    """Compare with a bitmap of free blocks, and with best fit over its stretches."""

    def __init__(self):
        super().__init__()
        self.allocator = SegmentAllocator(NUM_BLOCKS)
        self.is_free = [True] * NUM_BLOCKS

    def stretches(self):
        return list(split_runs(b for b in range(NUM_BLOCKS) if self.is_free[b]))

    def take(self, block_ids):
        assert all(self.is_free[b] for b in block_ids)
        assert len(set(block_ids)) == len(block_ids)
        for block_id in block_ids:
            self.is_free[block_id] = False

    @rule(count=counts)
    def allocate(self, count):
        before = self.stretches()
        block_ids = self.allocator.allocate(count)
        if count > sum(self.is_free):
            assert block_ids is None
            return
        fitting = [(length, start) for start, length in before if length >= count]
        if fitting:
            _, start = min(fitting)
            assert block_ids == list(range(start, start + count))
        else:
            assert len(run_lengths(block_ids)) == fewest_runs(count, before)
        self.take(block_ids)

    @precondition(lambda self: not all(self.is_free))
    @rule(data=st.data(), count=counts)
    def extend(self, data, count):
        held = [b for b in range(NUM_BLOCKS) if not self.is_free[b]]
        after = data.draw(st.sampled_from(held))
        room = 0
        while after + 1 + room < NUM_BLOCKS and self.is_free[after + 1 + room]:
            room += 1
        block_ids = self.allocator.extend(after, count)
        if count > sum(self.is_free):
            assert block_ids is None
            return
        adjacent = min(room, count)
        assert block_ids[:adjacent] == list(range(after + 1, after + 1 + adjacent))
        assert len(block_ids) == count
        self.take(block_ids)

    @rule(runs=st.lists(st.integers(1, 12), min_size=1, max_size=6))
    def allocate_like(self, runs):
        before = self.stretches()
        block_ids = self.allocator.allocate_like(runs)
        if sum(runs) > sum(self.is_free):
            assert block_ids is None
            return
        assert len(block_ids) == sum(runs)
        if any(length >= sum(runs) for _, length in before):
            assert len(run_lengths(block_ids)) == 1
        self.take(block_ids)

    @precondition(lambda self: not all(self.is_free))
    @rule(data=st.data())
    def free(self, data):
        held = [b for b in range(NUM_BLOCKS) if not self.is_free[b]]
        block_ids = data.draw(st.lists(st.sampled_from(held), unique=True, min_size=1))
        self.allocator.free(block_ids)
        for block_id in block_ids:
            self.is_free[block_id] = True

    @precondition(lambda self: any(self.is_free))
    @rule(data=st.data())
    def take_these(self, data):
        free = [b for b in range(NUM_BLOCKS) if self.is_free[b]]
        block_ids = data.draw(st.lists(st.sampled_from(free), unique=True, min_size=1))
        self.allocator.take(block_ids)
        self.take(block_ids)

    @invariant()
    def agrees_with_the_bitmap(self):
        self.allocator.check()
        stretches = self.stretches()
        lengths = [length for _, length in stretches]
        assert self.allocator.segments() == stretches
        assert self.allocator.num_free == sum(lengths)
        assert self.allocator.num_segments == len(lengths)
        assert self.allocator.largest_free == max(lengths, default=0)
        if lengths:
            share = max(lengths) / sum(lengths)
            assert self.allocator.external_fragmentation == pytest.approx(1 - share)

    def teardown(self):
        self.allocator.free([b for b in range(NUM_BLOCKS) if not self.is_free[b]])
        assert self.allocator.segments() == [(0, NUM_BLOCKS)]


def fewest_runs(count, stretches):
    """Count the longest stretches that together hold `count` blocks."""
    runs = 0
    for length in sorted((length for _, length in stretches), reverse=True):
        if count <= 0:
            break
        count -= length
        runs += 1
    return runs


AllocatorMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestAllocator = AllocatorMachine.TestCase


def with_segments(*lengths):
    """Make an allocator whose free segments have these lengths, in this order, one block apart."""
    allocator = SegmentAllocator(sum(lengths) + len(lengths))
    allocator.allocate(allocator.num_blocks)
    start = 0
    for length in lengths:
        allocator.free(range(start, start + length))
        start += length + 1
    return allocator


def test_a_peers_runs_are_reproduced_where_one_segment_cannot_hold_all():
    allocator = with_segments(4, 6, 3, 8)

    block_ids = allocator.allocate_like([3, 6, 4])

    assert run_lengths(block_ids) == [3, 6, 4]


def test_one_segment_for_all_runs_is_better_than_the_runs():
    allocator = with_segments(3, 9, 4)

    assert run_lengths(allocator.allocate_like([4, 3, 2])) == [9]


def test_the_longest_run_chooses_first():
    # In the peer's order the run of 3 would cut the only segment that holds the run of 5.
    allocator = with_segments(5, 2, 1)

    assert run_lengths(allocator.allocate_like([3, 5])) == [2, 1, 5]


def test_a_run_that_fits_nowhere_is_cut_into_the_fewest_pieces():
    allocator = with_segments(3, 4, 1, 1)

    assert run_lengths(allocator.allocate_like([8])) == [4, 3, 1]


def test_the_rest_of_a_cut_run_takes_the_tightest_segment():
    allocator = with_segments(7, 2, 5)

    assert run_lengths(allocator.allocate(9)) == [7, 2]


@pytest.mark.parametrize("block_id", [4, 6, 7])
def test_freeing_a_free_block_is_a_bug(block_id):
    allocator = SegmentAllocator(8)
    allocator.allocate(4)

    with pytest.raises(AssertionError):
        allocator.free([block_id])


def test_taking_a_block_that_is_not_free_is_a_bug():
    allocator = SegmentAllocator(8)
    allocator.allocate(4)

    with pytest.raises(AssertionError):
        allocator.take([3])


def test_runs_of_a_block_table():
    assert run_lengths([4, 5, 6, 0, 1, 9, 8]) == [3, 2, 1, 1]
    assert run_lengths([]) == []
    assert list(split_runs([0, 1, 3])) == [(0, 2), (3, 1)]
