"""Blocks go down to tiers when nobody holds them, and come up before a request that wants them."""

from msgspec.structs import replace

from penstock.core.events import Move, MoveClass, MoveDone, SubmitMove
from penstock.core.messages import BlocksChanged, Cancel, Tokens
from penstock.core.tiers import KeptBlock, TierConfig, TierLoad
from penstock.core.types import NO_DIGEST, BlockHash, Digest, RequestId
from tests.worker.story import LAYOUT, P0, Story, assign, request

DRAM = TierConfig(name="dram", num_slots=8, bytes_per_s=10_000_000_000)
DISK = TierConfig(name="disk", num_slots=8, bytes_per_s=1_000_000_000)

(BLOCK_BYTES,) = LAYOUT.block_bytes
ENCODED, DECODED = 1000, 2000
"""What a lossy codec makes of digests, on the way in and on the way out."""
INT8 = TierConfig(
    name="dram", num_slots=8, bytes_per_s=10**10, codec="int8", is_lossy=True, slot_bytes=9
)


class Below:
    """A story whose tiers carry out what they are told, as digests alone."""

    def __init__(self, *tiers: TierConfig, num_blocks: int = 7, max_num_seqs: int = 64) -> None:
        self.story = Story(
            P0,
            num_blocks=num_blocks,
            max_num_batched_tokens=200,
            max_num_seqs=max_num_seqs,
            tiers=tiers,  # type: ignore[arg-type]
            is_defragmenting=False,
        )
        self.slots: dict[tuple[str, int], Digest] = {}
        self.codecs = {tier.name for tier in tiers if tier.is_lossy}

    def run(self, name: str, start: int, num_prompt: int = 40, **more: bool) -> int:
        """Run a request to its end, with all moves; return how many tokens it found cached."""
        asked = request(name, num_prompt, start=start, max_tokens=1)
        self.story.tell(assign(replace(asked, **more), P0))
        self.move_all()
        (cached,) = self.story.steps[0].num_computed.tolist()
        self.story.step()
        assert self.story.heard(Tokens)
        self.move_all()
        return int(cached)

    def move_all(self) -> None:
        while self.story.moves:
            self.land()

    def land(self, error: str | None = None, wrong: int | None = None) -> Move:
        """End the first move; the digest of its block number `wrong` is."""
        (submit, *self.story.moves) = self.story.moves
        assert isinstance(submit, SubmitMove)
        move = submit.move
        (spans,), ends = move.spans, move.tiers
        assert ends is not None
        digests: tuple[tuple[Digest, ...], ...] = ()
        if ends.destination:
            to = [s.destination + i for s in spans for i in range(s.num_blocks)]
            of = move.digests[0]
            if ends.destination in self.codecs:
                of = tuple(Digest(digest + ENCODED) for digest in of)
                digests = (of,)
            for slot, digest in zip(to, of, strict=True):
                self.slots[ends.destination, slot] = digest
        elif error is None:
            of = [s.source + i for s in spans for i in range(s.num_blocks)]
            found = [self.slots[ends.source, slot] for slot in of]
            if wrong is not None:
                found[wrong] = Digest(found[wrong] ^ 1)
            if ends.source in self.codecs:
                # Compared before it is decoded into another content.
                found = [
                    Digest(was + DECODED) if was == wanted else NO_DIGEST
                    for was, wanted in zip(found, move.digests[0], strict=True)
                ]
            digests = (tuple(found),)
        self.story.tell(
            MoveDone(
                move_id=move.move_id,
                num_bytes=sum(s.num_blocks for s in spans),
                num_spans=len(spans),
                transport="test",
                started_ns=0,
                finished_ns=10,
                error=error,
                digests=() if error else digests,
                codec_ns=7 if self.codecs & {ends.source, ends.destination} else 0,
            )
        )
        return move

    def assert_nothing_held(self) -> None:
        """No move is under way, so none reads a block of a tier."""
        for shelf in self.story.worker.tiers.shelves:
            assert not [name for name in shelf.names() if shelf.is_held(name)], shelf.name
            assert shelf.num_moving == (0, 0), shelf.name

    def load(self, index: int = 0) -> TierLoad:
        return self.story.worker.load().tiers[index]


def crowd_out(below: Below) -> None:
    """Fill the pool with others."""
    for number in range(3):
        below.run(f"other{number}", 1000 * (number + 1), 60)


def test_without_tiers_nothing_moves_and_nothing_is_said() -> None:
    below = Below()
    below.run("a", 100)
    assert below.story.worker.load().tiers == ()


def test_an_idle_worker_writes_what_was_let_go_in_one_move() -> None:
    below = Below(DRAM)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    assert not story.moves
    story.step()
    (submit,) = story.moves
    assert submit.move.kind is MoveClass.OFFLOAD
    assert submit.move.tiers is not None
    assert (submit.move.tiers.source, submit.move.tiers.destination) == ("", "dram")
    assert [span.num_blocks for span in submit.move.spans[0]] == [2]
    below.land()
    assert below.load().num_used == 2
    story.assert_empty()
    # It is there already: nothing is written twice.
    assert below.run("a again", 100) == 32
    assert below.load().num_used == 2


def test_what_the_pool_has_lost_comes_back_before_the_first_step() -> None:
    below = Below(DRAM)
    below.run("a", 100)
    below.run("other", 1000, 100)
    story = below.story
    story.tell(assign(request("a again", 40, start=100, max_tokens=1), P0))
    assert not story.steps
    (submit,) = story.moves
    assert submit.move.kind is MoveClass.ONBOARD
    assert submit.move.request_id == "a again"
    below.land()
    assert story.steps[0].num_computed.tolist() == [32]
    story.step()
    below.move_all()
    story.assert_empty()
    assert below.load().num_hits == 2
    assert below.load().exposed_ns > 0


def returning(below: Below) -> Story:
    """A request is waiting for two blocks that come up."""
    below.run("a", 100)
    below.run("other", 1000, 100)
    below.story.tell(assign(request("a again", 40, start=100, max_tokens=1), P0))
    assert len(below.story.moves) == 1
    return below.story


def test_a_wrong_block_is_dropped_and_computed_and_what_is_before_it_is_used() -> None:
    below = Below(DRAM)
    story = returning(below)
    used = below.load().num_used
    below.land(wrong=1)
    assert story.steps[0].num_computed.tolist() == [16]
    assert (below.load().num_corrupt, below.load().num_used) == (1, used - 1)
    story.step()
    below.move_all()
    story.assert_empty()


def test_a_tier_that_cannot_be_read_loses_the_blocks_and_the_request_computes() -> None:
    below = Below(DRAM)
    story = returning(below)
    used = below.load().num_used
    below.land(error="gone")
    assert story.steps[0].num_computed.tolist() == [0]
    assert (below.load().num_failed, below.load().num_used) == (2, used - 2)
    story.step()
    below.move_all()
    story.assert_empty()


def test_a_request_that_is_cancelled_meanwhile_leaves_nothing_but_the_blocks() -> None:
    below = Below(DRAM)
    story = returning(below)
    story.tell(Cancel(request_id=RequestId("a again")))
    below.land()
    assert not story.steps
    story.assert_empty()
    assert below.run("a once more", 100) == 32


def test_two_requests_wait_for_one_move() -> None:
    below = Below(DRAM)
    story = returning(below)
    story.tell(assign(request("another", 40, start=100, max_tokens=1), P0))
    below.land()
    assert story.steps[0].num_computed.tolist() == [32, 32]
    assert below.load().num_hits == 2


def test_what_a_tier_gives_up_sinks_to_the_next_and_is_found_there() -> None:
    below = Below(DRAM, DISK)
    below.run("a", 100)
    crowd_out(below)
    assert (below.load(0).num_used, below.load(0).num_evicted) == (8, 0)
    assert below.load(1).num_used == 3
    # The end of the oldest prompt went first, and still comes in one step with the rest.
    assert below.run("a again", 100) == 32
    assert below.load(1).num_hits + below.load(0).num_hits == 2
    assert below.load(1).num_hits > 0


def test_what_came_from_a_farther_tier_is_in_the_nearest_afterwards() -> None:
    below = Below(TierConfig(name="dram", num_slots=9, bytes_per_s=10_000_000_000), DISK)
    below.run("a", 100)
    crowd_out(below)
    assert below.load(1).num_used == 2
    assert below.run("a again", 100) == 32
    crowd_out_once(below)
    hits = below.load(0).num_hits, below.load(1).num_hits
    assert below.run("a once more", 100) == 32
    assert (below.load(0).num_hits, below.load(1).num_hits) == (hits[0] + 2, hits[1])


def crowd_out_once(below: Below) -> None:
    """Fill the pool with one other."""
    below.run("one other", 5000, 100)


def test_out_of_the_last_tier_the_oldest_is_dropped() -> None:
    below = Below(DRAM)
    below.run("a", 100)
    crowd_out(below)
    assert (below.load().num_used, below.load().num_evicted) == (8, 3)


def test_a_tier_that_cannot_be_written_is_left_alone_for_a_while() -> None:
    below = Below(DISK)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.step()
    below.land(error="No space left on device")
    assert (below.load().num_failed, below.load().num_used) == (2, 0)
    below.run("b", 1000)
    assert below.load().num_failed == 2
    story.now_ns += 11_000_000_000
    below.run("c", 2000)
    assert below.load().num_used == 2


def test_a_block_that_was_overwritten_while_it_was_copied_does_not_count() -> None:
    below = Below(DRAM)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.step()
    assert len(story.moves) == 1
    story.tell(assign(request("big", 110, start=1000, max_tokens=1), P0))
    story.step()
    below.land()
    assert below.load().bytes_in == 0
    assert story.worker.tiers.num_missed == 2


def test_a_worker_finds_what_an_earlier_one_left() -> None:
    first = Below(DISK)
    story = first.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.step()
    move = first.land()
    (spans,), ends = move.spans, move.tiers
    assert ends is not None
    to = [s.destination + i for s in spans for i in range(s.num_blocks)]
    kept = tuple(
        KeptBlock(slot, BlockHash(name), digest)
        for slot, name, digest in zip(to, ends.names, move.digests[0], strict=True)
    )
    tier = TierConfig(name="disk", num_slots=8, bytes_per_s=1_000_000_000, kept=kept)
    second = Below(tier)
    second.slots = first.slots
    assert second.run("a", 100) == 32


def test_what_is_quicker_computed_is_not_waited_for() -> None:
    slow = TierConfig(name="dram", num_slots=8, bytes_per_s=1, latency_ns=10_000_000_000)
    below = Below(slow)
    below.run("a", 100)
    below.run("other", 1000, 100)
    below.story.worker.tiers.note_step(100, 100_000)
    assert below.run("a again", 100) == 0


def told(below: Below, known: set[BlockHash]) -> set[BlockHash]:
    """Return what the controller takes to be here, by what it was told."""
    for message in below.story.heard(BlocksChanged):
        assert isinstance(message, BlocksChanged)
        known = (known | set(message.stored)) - set(message.removed)
    return known


def test_the_controller_hears_of_what_is_in_the_pool_or_in_a_tier_and_of_nothing_else() -> None:
    below = Below(DRAM, TierConfig(name="disk", num_slots=2, bytes_per_s=1_000_000_000))
    below.run("a", 100)
    known = told(below, set())
    assert len(known) == 2
    for number in range(6):
        below.run(f"other{number}", 1000 * (number + 1), 60)
        known = told(below, known)
    desk, cache = below.story.worker.tiers, below.story.worker.kv.groups[0].pool.prefix_cache
    assert known == {name for name in known if desk.has(name) or cache.find(name) is not None}
    assert len(known) > cache.num_indexed
    assert below.load(1).num_evicted > 0


def test_the_controller_hears_of_what_was_there_at_the_start() -> None:
    kept = (KeptBlock(3, BlockHash(b"k" * 16), Digest(7)),)
    below = Below(TierConfig(name="disk", num_slots=8, bytes_per_s=1_000_000_000, kept=kept))
    below.run("a", 100)
    assert kept[0].name in told(below, set())


def test_what_a_request_asked_to_keep_stays_in_pool_and_tier_while_others_go() -> None:
    below = Below(DRAM, num_blocks=12)
    story = below.story
    kept = replace(request("kept", 40, start=100, max_tokens=1), retention_ns=10**9)
    story.tell(assign(kept, P0))
    story.step()
    below.move_all()
    for number in range(6):
        below.run(f"other{number}", 1000 * (number + 1), 60)
    cache = story.worker.kv.groups[0].pool.prefix_cache
    names = story.worker.tiers.names()
    assert set(names) >= {n for n in told(below, set()) if cache.find(n) in (0, 1)}
    assert below.run("kept again", 100) == 32
    assert below.load().num_hits == 0, "it never left the pool"
    story.now_ns += 2 * 10**9
    for number in range(6):
        below.run(f"more{number}", 10_000 + 1000 * number, 60)
    assert below.run("kept no longer", 100) == 0


def test_a_pin_outlasts_what_is_retained_and_a_ttl_of_nothing_lets_go_of_it() -> None:
    below = Below(num_blocks=12)
    story = below.story

    def run(name: str, start: int, **more: object) -> None:
        story.tell(assign(replace(request(name, 40, start=start, max_tokens=1), **more), P0))
        story.step()

    run("pinned", 100, retention_ns=10**9, pin="docs")
    retention = story.worker.kv.retention
    names = [n for n in told(below, set()) if retention.strength(n) == 2]
    assert len(names) == 2
    run("let go", 100, pin="docs")
    assert [retention.strength(n) for n in names] == [0, 0]
