"""Which blocks of one pool may be written, as segments, so that a request gets long runs.

What a transfer costs in calls is the number of runs, so runs are made here, when blocks are handed
out. The fit is the tightest one and takes the head of its segment: long segments are what long
prompts need, and a request that knows how far it will grow asks for all its blocks at once instead
of hoping that the ones behind it stay free. The allocator knows no request, no contents and no
reference count; `kv/pool.py` calls it, and decides which blocks count as free.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from penstock.core.types import BlockId


class SegmentAllocator:
    """Hands out blocks of `[0, num_blocks)` and takes them back. Free neighbours are one segment.

    With s free segments, choosing one is O(log s), splitting or joining one moves at most 16 * s
    bytes in two calls.
    Source: FlowKV (arXiv 2504.03775), segment allocator and alignment; tie-breaks and growth are
    ours.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self.num_free = 0
        self._length_at: dict[int, int] = {}  # first block of a segment -> its length
        self._starts: list[int] = []  # the same first blocks, sorted
        self._by_length: list[int] = []  # sorted `length * num_blocks + start`: one int a segment
        self._insert(0, num_blocks)

    @property
    def num_segments(self) -> int:
        """Number of free segments."""
        return len(self._by_length)

    @property
    def largest_free(self) -> int:
        """Blocks of the longest free segment; what one run can have at most."""
        return self._by_length[-1] // self.num_blocks if self._by_length else 0

    @property
    def external_fragmentation(self) -> float:
        """Share of free blocks outside the longest segment: 0 when all are one run."""
        return 1.0 - self.largest_free / self.num_free if self.num_free else 0.0

    def segments(self) -> list[tuple[int, int]]:
        """Return the free segments as (first block, length), in order of position."""
        return [(start, self._length_at[start]) for start in self._starts]

    def allocate(self, count: int) -> list[BlockId] | None:
        """Take `count` blocks in as few runs as possible; None when fewer are free.

        One run where any segment is long enough: the shortest such, the lowest on ties. Otherwise
        whole segments, longest first, and the tightest fit for what remains.
        """
        if count > self.num_free:
            return None
        block_ids: list[BlockId] = []
        while len(block_ids) < count:
            start, length = self._choose(count - len(block_ids))
            self._cut(start, min(length, count - len(block_ids)), block_ids)
        return block_ids

    def extend(self, after: BlockId, count: int) -> list[BlockId] | None:
        """Take `count` blocks, first those right behind `after`; None changes nothing."""
        if count > self.num_free:
            return None
        block_ids: list[BlockId] = []
        length = self._length_at.get(after + 1, 0)
        if length:
            self._cut(after + 1, min(length, count), block_ids)
        if len(block_ids) < count:
            block_ids += self.allocate(count - len(block_ids)) or ()
        return block_ids

    def allocate_like(self, runs: Sequence[int]) -> list[BlockId] | None:
        """Take `sum(runs)` blocks that break, as far as possible, only where a peer's runs do.

        Best is one segment for all. Otherwise each run gets its own tightest fit, longest run
        first, because it has the fewest segments to choose from; a run that fits nowhere is cut.
        None, and nothing changed, when fewer are free. The ids are in the peer's order.
        """
        count = sum(runs)
        if count > self.num_free:
            return None
        if count <= self.largest_free:
            return self.allocate(count)
        pieces: list[list[BlockId]] = [[] for _ in runs]
        for index in sorted(range(len(runs)), key=lambda i: -runs[i]):
            pieces[index] = self.allocate(runs[index]) or []
        return [block_id for piece in pieces for block_id in piece]

    def free(self, block_ids: Iterable[BlockId]) -> None:
        """Take blocks back, in any order, and join them with their free neighbours."""
        for start, length in split_runs(sorted(block_ids)):
            self._join(start, length)

    def take(self, block_ids: Iterable[BlockId]) -> None:
        """Take these very blocks, all of them free; in ascending runs it costs O(log s) a run."""
        for start, length in split_runs(block_ids):
            end = start + length
            first = self._starts[bisect_right(self._starts, start) - 1]
            last = first + self._remove(first)
            assert first <= start < end <= last, f"[{start}, {end}) is not all free"
            if first < start:
                self._insert(first, start - first)
            if end < last:
                self._insert(end, last - end)

    def check(self) -> None:
        """Assert that the three indexes agree and that no two free segments overlap or touch."""
        end_before = -1
        for start, length in self.segments():
            assert length > 0, (start, length)
            assert start > end_before, f"free segment {start} reaches the one to {end_before}"
            end_before = start + length
        assert end_before <= self.num_blocks, end_before
        assert sum(self._length_at.values()) == self.num_free, self.num_free
        assert self._starts == sorted(self._length_at)
        assert self._by_length == sorted(
            n * self.num_blocks + s for s, n in self._length_at.items()
        )

    def _choose(self, count: int) -> tuple[int, int]:
        """Return the tightest segment that fits, or the longest (the highest on ties)."""
        index = bisect_left(self._by_length, count * self.num_blocks)
        key = self._by_length[min(index, len(self._by_length) - 1)]
        length, start = divmod(key, self.num_blocks)
        return start, length

    def _cut(self, start: int, count: int, block_ids: list[BlockId]) -> None:
        """Move the first `count` blocks of the segment at `start` into `block_ids`."""
        length = self._remove(start)
        if length > count:
            self._insert(start + count, length - count)
        block_ids.extend(cast("Iterable[BlockId]", range(start, start + count)))

    def _join(self, start: int, length: int) -> None:
        index = bisect_left(self._starts, start)
        if index:
            before = self._starts[index - 1]
            end = before + self._length_at[before]
            assert end <= start, f"block {start} is free already"
            if end == start:
                length += self._remove(before)
                start = before
        if start + length in self._length_at:
            length += self._remove(start + length)
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        assert start not in self._length_at, f"block {start} is free already"
        self._length_at[start] = length
        insort(self._starts, start)
        insort(self._by_length, length * self.num_blocks + start)
        self.num_free += length
        assert self.num_free <= self.num_blocks, "more blocks freed than there are"

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, length * self.num_blocks + start)]
        self.num_free -= length
        return length


def split_runs(block_ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, length) of each stretch in which every id is one more than the id before."""
    start = end = -1
    for block_id in block_ids:
        if block_id != end:
            if end >= 0:
                yield start, end - start
            start = block_id
        end = block_id + 1
    if end >= 0:
        yield start, end - start


def run_lengths(block_ids: Iterable[int]) -> list[int]:
    """Return the lengths of the runs of a block table, in its order."""
    return [length for _, length in split_runs(block_ids)]
