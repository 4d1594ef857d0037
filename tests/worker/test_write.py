"""What lies in a tier by way of a codec: by what it is known, whom it serves, what did not fit."""

from msgspec.structs import replace

from penstock.core.events import MoveDone
from penstock.core.types import NO_DIGEST
from tests.worker.story import P0, assign, request
from tests.worker.test_tiers import (
    BLOCK_BYTES,
    DECODED,
    DISK,
    DRAM,
    ENCODED,
    INT8,
    Below,
    crowd_out,
)


def test_a_lossy_tier_is_known_by_its_slots_and_gives_other_content() -> None:
    below = Below(INT8)
    below.run("a", 100, accepts_loss=True)
    story = below.story
    assert below.load().num_used == 2
    assert (below.load().bytes_in, below.load().encode_ns) == (18, 7)
    below.run("other", 1000, 100, accepts_loss=True)
    assert below.run("a again", 100, accepts_loss=True) == 32
    load = below.load()
    assert (load.num_hits, load.decode_ns, load.raw_bytes_out) == (2, 7, 2 * BLOCK_BYTES)
    # It was waited for longer than the move took, so all of the decoding was.
    assert load.exposed_ns > load.exposed_decode_ns == 7
    # What came back has digests of its own, by which peers know it from here on.
    pool = story.worker.kv.groups[0].pool
    found = [pool.prefix_cache.find(name) for name in story.worker.tiers.names()]
    digests = [pool.digest(block) for block in found if block is not None]
    assert any(digest > ENCODED + DECODED for digest in digests)
    story.assert_empty()


def test_a_wrong_slot_of_a_lossy_tier_is_not_decoded_and_its_block_computed() -> None:
    below = Below(INT8)
    below.run("a", 100, accepts_loss=True)
    below.run("other", 1000, 100, accepts_loss=True)
    asked = request("a again", 40, start=100, max_tokens=1)
    below.story.tell(assign(replace(asked, accepts_loss=True), P0))
    below.land(wrong=1)
    assert below.story.steps[0].num_computed.tolist() == [16]
    assert below.load().num_corrupt == 1
    below.story.step()
    below.move_all()
    below.story.assert_empty()


def test_an_exact_request_is_not_served_by_a_lossy_tier_and_leaves_nothing_there() -> None:
    below = Below(INT8)
    below.run("a", 100, accepts_loss=True)
    used = below.load().num_used
    below.run("exact", 100)
    assert below.load().num_used == used
    crowd_out(below)
    assert below.run("exact again", 100) == 0
    assert below.load().num_hits == 0


def test_exact_blocks_go_past_a_lossy_tier_to_one_that_is_not() -> None:
    below = Below(INT8, DISK)
    below.run("exact", 100)
    below.run("a", 2000, accepts_loss=True)
    assert (below.load(0).num_used, below.load(1).num_used) == (2, 2)
    below.run("other", 1000, 100, accepts_loss=True)
    assert below.run("exact again", 100) == 32
    assert (below.load(0).num_hits, below.load(1).num_hits) == (0, 2)


def test_a_block_that_did_not_fit_its_slot_is_not_there() -> None:
    below = Below(DRAM)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.step()
    (submit,) = story.moves
    story.moves = []
    (digests,) = submit.move.digests
    story.tell(
        MoveDone(
            move_id=submit.move.move_id,
            num_bytes=1,
            num_spans=1,
            transport="test",
            started_ns=0,
            finished_ns=1,
            digests=((digests[0], NO_DIGEST),),
        )
    )
    assert (below.load().num_used, below.load().num_failed) == (1, 1)
    story.assert_empty()
