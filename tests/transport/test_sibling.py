"""Tiers of other workers: read where they lie, as they are, until their owner is gone."""

from pathlib import Path

import numpy as np
import pytest

from penstock.core.descriptors import RegionDescriptor, TierRegion, WorkerInfo
from penstock.core.errors import PeerLost
from penstock.core.events import Move, MoveClass, Span, TierEnds
from penstock.core.types import BlockHash, BlockId, RequestId, WorkerId
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import span_array
from penstock.transfer.region import Region
from penstock.transport.cxl import EmulatedTier
from penstock.transport.disk import DiskTier
from penstock.transport.sibling import SiblingTiers
from penstock.transport.tier import MemoryTier, TierStore
from penstock.transport.tier_mover import TierMover
from tests.worker.story import info_of

OWN, OTHER = WorkerId("p0"), WorkerId("d0")
NAMES = tuple(BlockHash(bytes([i]) * 16) for i in range(2))


def make_pool() -> Region:
    return Region(np.random.default_rng(4).integers(0, 256, (6, 4096), np.uint8))


def with_tiers(stores: dict[str, TierStore], epoch: int = 1) -> WorkerInfo:
    info = info_of(OTHER)
    tiers = tuple(TierRegion(n, store.kind, store.descriptor) for n, store in stores.items())
    kept = {name: getattr(info, name) for name in info.__struct_fields__}
    return WorkerInfo(**{**kept, "epoch": epoch, "tiers": tiers})


def up(tier: str, *spans: Span, source: WorkerId = OTHER, epoch: int = 1) -> Move:
    return Move(
        move_id=1,
        kind=MoveClass.ONBOARD,
        request_id=RequestId("r"),
        source=source,
        epoch=epoch,
        spans=(spans,),
        tiers=TierEnds(tier, ""),
    )


@pytest.fixture
def stores(tmp_path: Path):
    made: dict[str, TierStore] = {
        "dram": MemoryTier(4, 4096),
        "cxl": EmulatedTier(4, 4096),
        "disk": DiskTier(tmp_path / "d0.kv", 4, 4096, "f"),
    }
    yield made
    for store in made.values():
        store.close()


@pytest.mark.parametrize("tier", ["dram", "cxl", "disk"])
def test_what_a_sibling_has_written_comes_up(stores: dict[str, TierStore], tier: str):
    theirs, ours = make_pool(), Region(np.zeros((6, 4096), np.uint8))
    digests = take_digests(theirs.blocks, [BlockId(1), BlockId(2)])
    stores[tier].write(theirs, span_array([Span(BlockId(1), BlockId(2), 2)]), NAMES, digests)
    siblings = SiblingTiers(OWN, "f")
    siblings.add_peer(with_tiers(stores))
    mover = TierMover(ours, {}, siblings=siblings)
    done = mover.execute(up(tier, Span(BlockId(2), BlockId(4), 2)))
    assert (done.error, done.digests, done.transport) == (None, (digests,), stores[tier].kind)
    assert (ours.blocks[4:6] == theirs.blocks[1:3]).all()
    # A slot that is given to another block is read as what it is then.
    stores[tier].write(
        theirs, span_array([Span(BlockId(5), BlockId(2), 1)]), NAMES[:1], digests[:1]
    )
    again = mover.execute(up(tier, Span(BlockId(2), BlockId(0), 1)))
    assert again.error is None
    assert again.digests == (take_digests(theirs.blocks, [BlockId(5)]),)
    siblings.forget(OTHER, 1)
    assert "not known" in (mover.execute(up(tier, Span(BlockId(2), BlockId(0), 1))).error or "")


def test_a_former_incarnation_and_slots_that_are_not_there_are_errors(
    stores: dict[str, TierStore],
):
    siblings = SiblingTiers(OWN, "f")
    siblings.add_peer(with_tiers(stores, epoch=2))
    mover = TierMover(make_pool(), {}, siblings=siblings)
    assert mover.execute(up("dram", Span(BlockId(0), BlockId(0), 1), epoch=1)).error
    assert mover.execute(up("dram", Span(BlockId(3), BlockId(0), 2), epoch=2)).error
    assert mover.execute(up("none", Span(BlockId(0), BlockId(0), 1), epoch=2)).error
    siblings.forget(OTHER, 1)
    assert not mover.execute(up("dram", Span(BlockId(0), BlockId(0), 1), epoch=2)).error
    siblings.forget(OTHER, 2)


def test_a_file_of_something_else_is_not_read(stores: dict[str, TierStore]):
    siblings = SiblingTiers(OWN, "another model")
    siblings.add_peer(with_tiers(stores))
    with pytest.raises(PeerLost, match="another model"):
        siblings.find(OTHER, 1, "disk")
    gone = TierRegion("disk", "disk", RegionDescriptor("disk", "/nowhere", 4096, 4096))
    info = with_tiers(stores)
    siblings.add_peer(
        WorkerInfo(**{**{n: getattr(info, n) for n in info.__struct_fields__}, "tiers": (gone,)})
    )
    with pytest.raises(PeerLost, match="cannot be read"):
        siblings.find(OTHER, 1, "disk")


def test_a_file_that_is_cut_short_reads_as_zeros(stores: dict[str, TierStore], tmp_path: Path):
    siblings = SiblingTiers(OWN, "f")
    siblings.add_peer(with_tiers(stores))
    pool = make_pool()
    mover = TierMover(pool, {}, siblings=siblings)
    with (tmp_path / "d0.kv").open("r+b") as file:
        file.truncate(9000)
    done = mover.execute(up("disk", Span(BlockId(3), BlockId(0), 1)))
    assert done.error is None
    assert not pool.blocks[0].any()
    siblings.forget(OTHER, 1)
