"""Moves between a pool and its tiers: bytes, digests, and a disk that fails."""

from collections.abc import Sequence

import numpy as np
import pytest

from penstock.core.events import Move, MoveClass, Span, TierEnds
from penstock.core.types import BlockHash, BlockId, Digest, RequestId, WorkerId
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Region
from penstock.transport.tier import MemoryTier
from penstock.transport.tier_mover import TierMover

NAMES = (BlockHash(b"a" * 16), BlockHash(b"b" * 16))


class FullDisk(MemoryTier):
    """A tier whose file system has no room left."""

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        raise OSError(28, "No space left on device")


def move(ends: TierEnds, *spans: Span, digests: tuple[Digest, ...] = ()) -> Move:
    return Move(
        move_id=1,
        kind=MoveClass.OFFLOAD if ends.destination else MoveClass.ONBOARD,
        request_id=RequestId(""),
        source=WorkerId("w"),
        epoch=1,
        spans=(spans,),
        digests=(digests,),
        tiers=ends,
    )


def make_pool() -> Region:
    return Region(np.random.default_rng(4).integers(0, 256, (6, 4096), np.uint8))


def test_down_between_tiers_and_up_again():
    pool = make_pool()
    digests = take_digests(pool.blocks, [BlockId(2), BlockId(3)])
    mover = TierMover(pool, {"near": MemoryTier(4, 4096), "far": MemoryTier(4, 4096)})
    down = move(TierEnds("", "near", NAMES), Span(BlockId(2), BlockId(0), 2), digests=digests)
    done = mover.execute(down)
    assert (done.error, done.num_bytes, done.num_spans) == (None, 8192, 1)
    sink = move(TierEnds("near", "far", NAMES), Span(BlockId(0), BlockId(2), 2), digests=digests)
    assert mover.execute(sink).error is None
    up = mover.execute(move(TierEnds("far", ""), Span(BlockId(2), BlockId(4), 2)))
    assert up.digests == (digests,)
    assert (pool.blocks[4:6] == pool.blocks[2:4]).all()
    assert up.transport == "dram"


def test_a_full_disk_is_an_error_and_not_the_end():
    mover = TierMover(make_pool(), {"disk": FullDisk(4, 4096)})
    down = move(
        TierEnds("", "disk", NAMES[:1]), Span(BlockId(0), BlockId(0), 1), digests=(Digest(1),)
    )
    error = mover.execute(down).error
    assert error is not None
    assert "No space left" in error


def test_slots_that_are_not_there_are_a_bug():
    mover = TierMover(make_pool(), {"dram": MemoryTier(4, 4096)})
    with pytest.raises(AssertionError, match="leaves the source"):
        mover.execute(move(TierEnds("dram", ""), Span(BlockId(3), BlockId(0), 2)))
