"""Which cached blocks to move within a pool so that the next long prompt finds one long run.

Blocks that requests hold stay where they are. Between them lie blocks that may be written, in
segments, and blocks kept for prefix hits, which stand between the segments. A plan moves those of
one stretch into short segments elsewhere; what they leave behind is one long segment:

    before   |held|free free|kept|free free free|held|free|held|
    after    |held|free free free free free free|held|kept|held|

Blocks without content are written, and, if that is allowed, spare ones, which may be overwritten
at any moment but until then could be hit: a full cache has few others.
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


@dataclass(frozen=True, slots=True)
class _Task:
    """What `plan_relocation` was asked."""

    pool: BlockPool
    moves_max: int
    wanted: int
    may_evict: bool

    def is_room(self, block_id: BlockId) -> bool:
        """Tell whether a cached block may be moved here."""
        if self.pool.state(block_id) is BlockState.FREE:
            return True
        return self.may_evict and self.pool.prefix_cache.is_spare(block_id)


def plan_relocation(
    pool: BlockPool, moves_max: int, *, wanted: int, may_evict: bool = False
) -> list[Relocation]:
    """Choose up to `moves_max` moves that make the longest free run as long as can be.

    Nothing when it has `wanted` blocks already, or no move makes it longer; no more than `wanted`,
    with few moves rather than the fewest. With `may_evict` spare blocks may be written, and lose
    their names to it. Every plan that is carried out leaves a longer run, so that plans come to an
    end. With s segments O(s * moves_max) and a look at each block that may be written.
    """
    segments = pool.allocator.segments()
    longest = pool.allocator.largest_free
    if not segments or longest >= wanted:
        return []
    task = _Task(pool, moves_max, wanted, may_evict)
    best = _best_stretch(task, segments)
    if min(best.length, wanted) <= longest:
        return []
    kept = [
        BlockId(block_id)
        for block_id in range(best.start, best.end)
        if pool.can_relocate(BlockId(block_id))
    ]
    room = (b for segment in segments for b in _room(task, segment))
    return _place(kept, list(split_runs(b for b in room if not best.start <= b < best.end)))


def _room(task: _Task, segment: Segment) -> list[BlockId]:
    """Return the blocks of a segment that cached ones may be moved to."""
    start, length = segment
    return [b for b in map(BlockId, range(start, start + length)) if task.is_room(b)]


def _best_stretch(task: _Task, segments: list[Segment]) -> _Stretch:
    """Return the longest stretch that the moves can free; a cheap one where several are as long as
    wanted.

    Two pointers over the segments: one more segment never makes a stretch shorter, and what costs
    too much, or is long enough, is so with one more.
    """
    barriers = _barriers(task, segments)
    kept_before = list(accumulate((n or 0 for n in barriers), initial=0))
    room_before = list(accumulate((len(_room(task, s)) for s in segments), initial=0))

    def between(first: int, last: int) -> tuple[_Stretch | None, int]:
        cost = kept_before[last] - kept_before[first]
        room = room_before[-1] - (room_before[last + 1] - room_before[first])
        if cost > task.moves_max:
            return None, room
        return _trimmed(task, segments[first], segments[last], cost, room), room

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
            if shorter is None or shorter.length < task.wanted:
                break
            stretch, room, first = shorter, room_of_shorter, first + 1
        # What was trimmed is room that is spoken for.
        room = max(room, stretch.num_kept)
        candidates.append(_widen(task, stretch, room))
    return max(candidates, key=lambda found: (min(found.length, task.wanted), -found.num_kept))


def _trimmed(task: _Task, first: Segment, last: Segment, cost: int, room: int) -> _Stretch | None:
    """Return the stretch from one segment to another, less as much of their outer ends as its
    `cost` cached blocks need beyond the `room` elsewhere; None when that is not enough.
    """
    start, end = first[0], last[0] + last[1]
    lacking = cost - room
    while lacking > 0 and end > last[0]:
        end -= 1
        lacking -= task.is_room(BlockId(end))
    while lacking > 0 and start < first[0] + first[1]:
        lacking -= task.is_room(BlockId(start))
        start += 1
    return _Stretch(start, end, cost) if lacking <= 0 else None


def _barriers(task: _Task, segments: list[Segment]) -> list[int | None]:
    """Return how many blocks stand behind each segment before the next; None when they may not, or
    are too many to, be moved.
    """
    barriers: list[int | None] = []
    for (start, length), (following, _) in pairwise(segments):
        between = range(start + length, following)
        is_open = len(between) <= task.moves_max and all(
            task.pool.can_relocate(BlockId(block_id)) for block_id in between
        )
        barriers.append(len(between) if is_open else None)
    return [*barriers, None]


def _widen(task: _Task, stretch: _Stretch, room: int) -> _Stretch:
    """Take in blocks behind and before a stretch, until it is as long as wanted, while what has to
    move finds one of `room` places elsewhere; a place that is taken in is none of them any more.
    """
    pool, cost = task.pool, stretch.num_kept
    start, end = stretch.start, stretch.end

    def takes(block_id: BlockId) -> bool:
        nonlocal cost, room
        is_kept, is_room = pool.can_relocate(block_id), task.is_room(block_id)
        if not (is_kept or is_room or pool.prefix_cache.is_spare(block_id)):
            return False
        if cost + is_kept > min(task.moves_max, room - is_room) or end - start >= task.wanted:
            return False
        cost, room = cost + is_kept, room - is_room
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
