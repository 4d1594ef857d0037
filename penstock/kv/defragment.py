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
from itertools import pairwise

from penstock.core.block import BlockState
from penstock.core.types import BlockId
from penstock.kv.allocator import split_runs
from penstock.kv.pool import BlockPool, Relocation


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

    Nothing when it has `wanted` blocks already, or no move makes it longer; no more moves than it
    takes to reach `wanted`. Every plan that is carried out leaves a longer run, so that plans come
    to an end. With s segments O(s * moves_max) at most, and far less in a pool that is full.
    """
    segments = pool.allocator.segments()
    longest = pool.allocator.largest_free
    if len(segments) < 2 or longest >= wanted:
        return []
    best = _best_stretch(pool, segments, moves_max, wanted)
    if best is None or min(best.length, wanted) <= longest:
        return []
    kept = [
        BlockId(block_id)
        for block_id in range(best.start, best.end)
        if pool.can_relocate(BlockId(block_id))
    ]
    empty = (b for segment in segments for b in _empty(pool, segment))
    return _place(kept, list(split_runs(b for b in empty if not best.start <= b < best.end)))


def _empty(pool: BlockPool, segment: tuple[int, int]) -> list[BlockId]:
    """Return the blocks of a segment that have no content; `segment` is (first block, length)."""
    start, length = segment
    blocks = map(BlockId, range(start, start + length))
    return [block_id for block_id in blocks if not pool.prefix_cache.is_indexed(block_id)]


def _best_stretch(
    pool: BlockPool, segments: list[tuple[int, int]], moves_max: int, wanted: int
) -> _Stretch | None:
    """Return the longest stretch that `moves_max` moves can free, the cheapest of those that reach
    `wanted`; None when there is none.

    Two pointers over the segments: a stretch that costs too much costs too much with one more.
    """
    empty = [len(_empty(pool, segment)) for segment in segments]
    total = sum(empty)
    barriers = _barriers(pool, segments, moves_max)
    best: _Stretch | None = None
    first = cost = inside = 0
    for last, (start, length) in enumerate(segments):
        before = barriers[last - 1] if last else None
        if before is None:
            first, cost, inside = last, 0, 0
        else:
            cost += before
        inside += empty[last]
        while cost > min(moves_max, total - inside):
            cost -= barriers[first] or 0
            inside -= empty[first]
            first += 1
        stretch = _Stretch(segments[first][0], start + length, cost)
        stretch = _widen(pool, stretch, moves_max, total - inside, wanted)
        if best is None or _worth(stretch, wanted) > _worth(best, wanted):
            best = stretch
    return best


def _worth(stretch: _Stretch, wanted: int) -> tuple[int, int]:
    return min(stretch.length, wanted), -stretch.num_kept


def _barriers(pool: BlockPool, segments: list[tuple[int, int]], moves_max: int) -> list[int | None]:
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


def _place(kept: Iterable[BlockId], room: list[tuple[int, int]]) -> list[Relocation]:
    """Give each run of cached blocks the tightest segment that takes it whole.

    So what was adjacent stays adjacent, and a prompt that hits it later crosses in as few spans. A
    run that fits nowhere takes the longest segments whole. `room` has (first block, length) each.
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
