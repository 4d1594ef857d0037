"""What workers of a host tell each other of their tiers, and what becomes of it."""

from msgspec import structs

from penstock.core.descriptors import RegionDescriptor, TierRegion, WorkerInfo
from penstock.core.messages import PeerDown, PeerUp
from penstock.core.tiers import KeptBlock, ShelfChanged, ShelfUsed, TierConfig
from penstock.core.types import BlockHash, Digest, WorkerId
from tests.worker.story import D0, P0, assign, info_of, offer_of, request
from tests.worker.test_tiers import DISK, DRAM, Below


def sibling(name: WorkerId, epoch: int = 1, host: str = "") -> WorkerInfo:
    info = info_of(name)
    kept = {field: getattr(info, field) for field in info.__struct_fields__}
    region = RegionDescriptor("test", "", 0, 0)
    tiers = (TierRegion("dram", "dram", region), TierRegion("disk", "disk", region))
    return WorkerInfo(**{**kept, "epoch": epoch, "host": host, "tiers": tiers})


def changed(*blocks: KeptBlock, epoch: int = 1, tier: str = "dram", **more: object) -> ShelfChanged:
    return ShelfChanged(worker_id=D0, epoch=epoch, tier=tier, stored=blocks, **more)  # type: ignore[arg-type]


def names_of_a() -> list[BlockHash]:
    """The names of the two full blocks of the request that `Below.run("a", 100)` makes, the last
    one first.
    """
    below = Below(DRAM)
    below.run("a", 100)
    return [block.name for block in below.story.worker.tiers.contents("dram")]


def told_of_a(*tiers: TierConfig, tier: str = "dram") -> Below:
    """A worker whose sibling has the two blocks."""
    below = Below(*tiers)
    below.story.tell(PeerUp(info=sibling(D0)))
    blocks = [KeptBlock(i, name, Digest(70 + i)) for i, name in enumerate(names_of_a())]
    below.story.tell(changed(*blocks, tier=tier))
    return below


def test_a_newcomer_is_told_all_and_then_what_changes() -> None:
    below = Below(DRAM)
    below.run("a", 100)
    below.story.tell(PeerUp(info=sibling(D0)))
    (first,) = below.story.heard(ShelfChanged)
    assert isinstance(first, ShelfChanged)
    assert (first.is_all, len(first.stored), first.removed) == (True, 2, ())
    assert {b.name for b in first.stored} == set(names_of_a())
    for number in range(4):
        below.run(f"other{number}", 1000 * (number + 1), 60)
    heard = below.story.heard(ShelfChanged)
    assert all(isinstance(e, ShelfChanged) and not e.is_all for e in heard)
    known = {b.name: b for b in first.stored}
    for event in heard:
        assert isinstance(event, ShelfChanged)
        known = {n: b for n, b in known.items() if n not in event.removed}
        known.update({b.name: b for b in event.stored})
    assert set(known.values()) == set(below.story.worker.tiers.contents("dram"))


def test_workers_of_other_hosts_and_other_shapes_are_told_nothing() -> None:
    below = Below(DRAM)
    below.story.tell(PeerUp(info=sibling(D0, host="elsewhere")))
    below.story.tell(PeerUp(info=info_of(D0)))
    below.run("a", 100)
    assert not below.story.heard(ShelfChanged)


def test_what_a_sibling_has_comes_up_and_is_not_written_again() -> None:
    below = told_of_a(DRAM)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    (submit,) = story.moves
    assert (submit.move.source, submit.move.epoch) == (D0, 1)
    below.slots = {("dram", 0): Digest(70), ("dram", 1): Digest(71)}
    below.land()
    assert story.steps[0].num_computed.tolist() == [32]
    (used,) = story.heard(ShelfUsed)
    assert isinstance(used, ShelfUsed)
    assert (set(used.right), used.wrong) == (set(names_of_a()), ())
    story.step()
    assert not story.moves
    assert (below.load().num_hits, below.load().num_shared, below.load().bytes_in) == (2, 2, 0)


def test_what_is_on_a_siblings_disk_is_written_to_our_memory() -> None:
    below = told_of_a(DRAM, DISK, tier="disk")
    below.slots = {("disk", 0): Digest(70), ("disk", 1): Digest(71)}
    assert below.run("a", 100) == 32
    assert (below.load(1).num_shared, below.load(0).num_used) == (2, 2)


def test_a_slot_that_was_reused_is_stale_and_its_owner_is_asked() -> None:
    below = told_of_a(DRAM)
    story = below.story
    below.slots = {("dram", 0): Digest(9), ("dram", 1): Digest(71)}
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    below.land()
    assert story.steps[0].num_computed.tolist() == [16]
    assert (below.load().num_stale, below.load().num_corrupt) == (1, 0)
    (used,) = story.heard(ShelfUsed)
    assert isinstance(used, ShelfUsed)
    assert [block.slot for block in used.wrong] == [0]
    # It is not there any more for us, so we keep one ourselves.
    story.step()
    below.move_all()
    assert below.load().num_used == 1


def test_only_an_owner_that_still_has_the_block_drops_it_as_corrupt() -> None:
    below = Below(DRAM)
    below.run("a", 100)
    first, second = below.story.worker.tiers.contents("dram")
    moved = KeptBlock(first.slot + 5, first.name, first.digest)
    below.story.tell(ShelfUsed(epoch=1, tier="dram", wrong=(moved,)))
    below.story.tell(ShelfUsed(epoch=9, tier="dram", wrong=(second,)))
    assert (below.load().num_corrupt, below.load().num_used) == (0, 2)
    below.story.tell(ShelfUsed(epoch=1, tier="dram", right=(first.name,), wrong=(second,)))
    assert (below.load().num_corrupt, below.load().num_used) == (1, 1)


def test_a_dead_siblings_names_vanish_and_what_is_said_late_is_not_heard() -> None:
    below = told_of_a(DRAM)
    below.story.tell(PeerDown(worker_id=D0, epoch=1))
    assert below.run("a", 100) == 0
    below = told_of_a(DRAM)
    below.story.tell(PeerUp(info=sibling(D0, epoch=2)))
    below.story.tell(changed(*[KeptBlock(0, n, Digest(1)) for n in names_of_a()], epoch=1))
    assert below.run("a", 100) == 0


def test_a_sibling_that_dies_while_it_is_read_costs_the_read() -> None:
    below = told_of_a(DRAM)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.tell(PeerDown(worker_id=D0, epoch=1))
    below.land(error="gone")
    assert story.steps[0].num_computed.tolist() == [0]
    assert below.load().num_failed == 2
    story.step()
    below.move_all()
    story.assert_empty()


def test_what_is_said_before_the_introduction_is_kept_for_it() -> None:
    below = Below(DRAM)
    blocks = [KeptBlock(i, name, Digest(70 + i)) for i, name in enumerate(names_of_a())]
    below.story.tell(changed(*blocks, is_all=True))
    below.slots = {("dram", 0): Digest(70), ("dram", 1): Digest(71)}
    below.story.tell(PeerUp(info=sibling(D0)))
    assert below.run("a", 100) == 32


def test_a_worker_that_only_decodes_writes_answers_for_its_siblings() -> None:
    offer = offer_of("r", 40, max_tokens=10)
    alone, together = Below(DRAM), Below(DRAM)
    together.story.tell(PeerUp(info=sibling(D0)))
    for below in (alone, together):
        story = below.story
        story.tell(structs.replace(offer, source=D0))
        story.land()
        while story.steps:
            story.step()
            below.move_all()
    assert (alone.load().num_used, together.load().num_used) == (0, 3)
