"""Which cached blocks to move within a pool so that the next long prompt finds one long run.

Blocks that requests hold stay where they are. Between them lie blocks that may be written, in
segments, and blocks kept for prefix hits, which stand between the segments. A plan moves those of
one stretch into short segments elsewhere; what they leave behind is one long segment:

    before   |held|free free|kept|free free free|held|free|held|
    after    |held|free free free free free free|held|kept|held|

Only blocks without content are written: a spare one, which still has its name, may yet be hit.
It reads a pool and changes nothing. An idle worker asks for a plan, has the pool pin and reserve
(`BlockPool.begin_relocation`), the bytes copied, and the names moved (`end_relocation`).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from penstock.core.block import BlockState
from penstock.core.types import BlockId
from penstock.kv.allocator import split_runs
from penstock.kv.pool import BlockPool, Relocation

Segment = tuple[int, int]
"""First block and length of blocks that may be written."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Blocks `[start, end)` that would be one free run if its `num_kept` blocks went elsewhere."""

    start: int
    end: int
    num_kept: int

    @property
    def length(self) -> int:
        return self.end - self.start


def plan_relocation(pool: BlockPool, moves_max: int, *, wanted: int) -> list[Relocation]:
    """Choose up to `moves_max` moves that make the longest free run as long as can be.

    Nothing when it has `wanted` blocks already, or no move makes it longer; no more than `wanted`,
    with few moves rather than the fewest. Every plan that is carried out leaves a longer run, so
    that plans come to an end. With s segments O(s * moves_max) and a look at each empty block.
    """
    segments = pool.allocator.segments()
    longest = pool.allocator.largest_free
    if not segments or longest >= wanted:
        return []
    best = _best_stretch(pool, segments, moves_max, wanted)
    if min(best.length, wanted) <= longest:
        return []
    kept = [
        BlockId(block_id)
        for block_id in range(best.start, best.end)
        if pool.can_relocate(BlockId(block_id))
    ]
    empty = (b for segment in segments for b in _empty(pool, segment))
    return _place(kept, list(split_runs(b for b in empty if not best.start <= b < best.end)))


def _empty(pool: BlockPool, segment: Segment) -> list[BlockId]:
    """Return the blocks of a segment that have no content."""
    start, length = segment
    blocks = map(BlockId, range(start, start + length))
    return [block_id for block_id in blocks if not pool.prefix_cache.is_indexed(block_id)]


def _best_stretch(
    pool: BlockPool, segments: list[Segment], moves_max: int, wanted: int
) -> _Stretch:
    """Return the longest stretch that `moves_max` moves can free; a cheap one where several reach
    `wanted`.

    Two pointers over the segments: one more segment never makes a stretch shorter, and what costs
    too much, or is long enough, is so with one more.
    """
    barriers = _barriers(pool, segments, moves_max)
    kept_before = list(accumulate((n or 0 for n in barriers), initial=0))
    empty_before = list(accumulate((len(_empty(pool, s)) for s in segments), initial=0))

    def between(first: int, last: int) -> tuple[_Stretch | None, int]:
        cost = kept_before[last] - kept_before[first]
        room = empty_before[-1] - (empty_before[last + 1] - empty_before[first])
        if cost > moves_max:
            return None, room
        return _trimmed(pool, segments[first], segments[last], cost, room), room

    candidates = []
    first = 0
    for last in range(len(segments)):
        if last and barriers[last - 1] is None:
            first = last
        stretch, room = between(first, last)
        while stretch is None:
            first += 1
            stretch, room = between(first, last)
        while first < last:
            shorter, room_of_shorter = between(first + 1, last)
            if shorter is None or shorter.length < wanted:
                break
            stretch, room, first = shorter, room_of_shorter, first + 1
        # What was trimmed is room that is spoken for.
        room = max(room, stretch.num_kept)
        candidates.append(_widen(pool, stretch, moves_max, room, wanted))
    return max(candidates, key=lambda found: (min(found.length, wanted), -found.num_kept))


def _trimmed(
    pool: BlockPool, first: Segment, last: Segment, cost: int, room: int
) -> _Stretch | None:
    """Return the stretch from one segment to another, less as much of their outer ends as its
    `cost` cached blocks need beyond the `room` elsewhere; None when that is not enough.
    """
    start, end = first[0], last[0] + last[1]
    lacking = cost - room
    while lacking > 0 and end > last[0]:
        end -= 1
        lacking -= pool.state(BlockId(end)) is BlockState.FREE
    while lacking > 0 and start < first[0] + first[1]:
        lacking -= pool.state(BlockId(start)) is BlockState.FREE
        start += 1
    return _Stretch(start, end, cost) if lacking <= 0 else None


def _barriers(pool: BlockPool, segments: list[Segment], moves_max: int) -> list[int | None]:
    """Return how many blocks stand behind each segment before the next; None when they may not, or
    are too many to, be moved.
    """
    barriers: list[int | None] = []
    for (start, length), (following, _) in pairwise(segments):
        between = range(start + length, following)
        is_open = len(between) <= moves_max and all(
            pool.can_relocate(BlockId(block_id)) for block_id in between
        )
        barriers.append(len(between) if is_open else None)
    return [*barriers, None]


def _widen(pool: BlockPool, stretch: _Stretch, moves_max: int, room: int, wanted: int) -> _Stretch:
    """Take in blocks behind and before a stretch, up to `wanted`, while what has to move finds one
    of `room` empty blocks elsewhere; an empty block that is taken in is none of them any more.
    """
    start, end, cost = stretch.start, stretch.end, stretch.num_kept

    def takes(block_id: BlockId) -> bool:
        nonlocal cost, room
        is_kept = pool.can_relocate(block_id)
        is_empty = pool.state(block_id) is BlockState.FREE
        if not (is_kept or is_empty or pool.prefix_cache.is_spare(block_id)):
            return False
        if cost + is_kept > min(moves_max, room - is_empty) or end - start >= wanted:
            return False
        cost, room = cost + is_kept, room - is_empty
        return True

    while end < pool.num_blocks and takes(BlockId(end)):
        end += 1
    while start > 0 and takes(BlockId(start - 1)):
        start -= 1
    return _Stretch(start, end, cost)


def _place(kept: Iterable[BlockId], room: list[Segment]) -> list[Relocation]:
    """Give each run of cached blocks the tightest segment that takes it whole.

    So what was adjacent stays adjacent, and a prompt that hits it later crosses in as few spans. A
    run that fits nowhere takes the longest segments whole.
    """
    by_length = sorted((length, start) for start, length in room)
    relocations: list[Relocation] = []
    for first, count in sorted(split_runs(kept), key=lambda run: -run[1]):
        source, left = first, count
        while left:
            index = min(bisect_left(by_length, (left, 0)), len(by_length) - 1)
            length, start = by_length.pop(index)
            taken = min(length, left)
            relocations += [
                Relocation(BlockId(source + i), BlockId(start + i)) for i in range(taken)
            ]
            if length > taken:
                insort(by_length, (length - taken, start + taken))
            source, left = source + taken, left - taken
    return relocations
