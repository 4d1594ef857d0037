"""The prefill worker's half of the hand-off, as stories."""

import pytest
from msgspec.structs import replace

from penstock.core.config import Handoff
from penstock.core.events import Woken
from penstock.core.messages import (
    Cancel,
    Expired,
    Offer,
    Offered,
    PeerDown,
    PeerUp,
    Progress,
    Release,
    Renew,
    RequestFailed,
    Withdraw,
)
from penstock.core.types import RequestId
from tests.worker.story import D0, P0, Story, assign, info_of, offer_of, request


def test_a_prefill_worker_computes_all_but_the_last_token_and_never_samples() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    step = story.step()
    assert step.num_new.tolist() == [39]
    assert step.samples == ()
    (offer,) = story.heard(Offer)
    assert offer.num_tokens == 39
    assert len(offer.groups[0].block_ids) == 3
    assert story.heard(Offered)
    assert not story.worker.is_idle  # the blocks stay until they are released
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


def test_a_prompt_that_is_cached_is_offered_without_a_step() -> None:
    story = Story(P0)
    for name in ("r", "again"):
        story.tell(assign(request(name, 33), D0))
        if story.steps:
            story.step()
        (offer,) = story.heard(Offer)
        story.tell(Release(request_id=RequestId(name), worker_id=D0))
    assert offer.timeline.cached_tokens == 32
    assert story.worker.load().steps == 1
    story.assert_empty()


def test_offers_carry_a_digest_of_every_block_the_last_one_too() -> None:
    offer = offer_of("r", 40)
    assert len(offer.groups[0].digests) == len(offer.groups[0].block_ids) == 3
    story = Story(D0)
    story.tell(offer)
    assert story.moves[0].move.digests == (offer.groups[0].digests,)


def streamed(story: Story, name: str = "r", num_prompt: int = 40) -> list[Progress]:
    """Have a prompt computed in chunks; return what was said after the offer of the first one."""
    story.tell(assign(request(name, num_prompt), D0))
    while story.steps:
        story.step()
    return story.heard(Progress)


def test_a_long_prompt_is_offered_chunk_by_chunk_and_completed_in_order() -> None:
    story = Story(P0, max_num_batched_tokens=18)
    progress = streamed(story)
    (offer,) = story.heard(Offer)
    assert (offer.num_tokens, offer.num_ready, offer.runs) == (39, 16, ((3,),))
    assert [(p.after, p.num_ready) for p in progress] == [(16, 32), (32, 39)]
    told = [block for message in (offer, *progress) for block in message.groups[0].block_ids]
    assert told == [0, 1, 2]
    assert [bool(p.timeline) for p in progress] == [False, True]
    assert len(story.heard(Offered)) == 1
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


def test_progress_that_the_peer_has_missed_is_said_again() -> None:
    story = Story(P0, max_num_batched_tokens=18)
    streamed(story)
    story.tell(Renew(request_ids=(RequestId("r"),), num_ready=(16,), worker_id=D0))
    (progress,) = story.heard(Progress)
    assert (progress.after, progress.num_ready) == (16, 39)
    assert len(progress.groups[0].block_ids) == 2
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


@pytest.mark.parametrize("end", ["release", "cancel", "peer_down", "expired"])
def test_a_prompt_that_is_offered_while_it_is_computed_can_end_at_any_step(end: str) -> None:
    story = Story(P0, max_num_batched_tokens=18)
    story.tell(assign(request("r", 60), D0))
    story.step()
    match end:
        case "release":  # the peer computes it itself, or wants it no more
            story.tell(Release(request_id=RequestId("r"), worker_id=D0))
        case "cancel":
            story.tell(Cancel(request_id=RequestId("r")))
            assert story.heard(Withdraw)
            story.tell(Release(request_id=RequestId("r"), worker_id=D0))
        case "peer_down":
            story.tell(PeerDown(worker_id=D0, epoch=1))
        case "expired":
            story.now_ns += 2 * story.worker.config.lease_ns
            story.tell(Woken("lease"))
            assert story.heard(Expired)
    assert not story.worker.is_idle  # the step under way still writes
    story.step()
    assert not story.steps
    story.assert_empty()


def test_blocks_that_a_peer_reads_are_never_taken_for_another_request() -> None:
    story = Story(P0, num_blocks=8, max_num_batched_tokens=20)
    story.tell(assign(request("read", 90), D0))
    story.tell(assign(request("other", 30, start=300, max_tokens=30), P0))
    for _ in range(4):
        story.step()
        assert story.worker.sequences[RequestId("read")].is_pinned
        (held,) = story.worker.kv.held(RequestId("read")) or ((),)
        assert len(held) == 6
    while story.steps:
        story.step()
    assert story.worker.load().running == 1  # the other one waits for room
    assert not story.worker.load().free_blocks[0]
    story.tell(Release(request_id=RequestId("read"), worker_id=D0))
    while story.steps:
        story.step()
    story.assert_empty()


def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.step()
    lease_ns = story.worker.config.lease_ns
    story.now_ns += lease_ns // 2
    story.tell(
        Renew(request_ids=(RequestId("r"), RequestId("unknown")), num_ready=(39, 0), worker_id=D0)
    )
    (withdraw,) = story.heard(Withdraw)
    assert withdraw.request_id == "unknown"  # nothing to wait for
    story.now_ns += lease_ns // 2
    story.tell(Woken("lease"))
    assert not story.worker.is_idle
    story.now_ns += lease_ns
    story.tell(Woken("lease"))
    (expired,) = story.heard(Expired)
    assert expired.request_id == "r"
    assert story.worker.load().leases_expired == 1
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


def test_what_a_peer_found_spoiled_is_not_computed_upon() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.step()
    story.tell(Release(request_id=RequestId("r"), worker_id=D0, is_spoiled=True))
    story.tell(assign(request("longer", 60), D0))
    assert story.step().num_computed.tolist() == [0]
    story.tell(Release(request_id=RequestId("longer"), worker_id=D0))
    story.assert_empty()


@pytest.mark.parametrize("moment", ["waiting", "in_step", "offered"])
def test_cancel_on_the_prefill_worker(moment: str) -> None:
    story = Story(P0)
    if moment == "waiting":
        story.tell(assign(request("other", 20, max_tokens=1), P0))
    story.tell(assign(request("r", 40, start=500), D0))
    if moment == "offered":
        story.step()
    story.tell(Cancel(request_id=RequestId("r")))
    if moment == "offered":
        assert story.heard(Withdraw)
        assert not story.worker.is_idle  # a read may be under way
        story.tell(Cancel(request_id=RequestId("r")))
        assert not story.heard(Withdraw)  # asked once is enough
        story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    else:
        story.step()
        assert not story.heard(Offer)
    story.assert_empty()


def test_a_dead_decode_worker_frees_what_was_offered_to_it() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.tell(assign(request("late", 40, start=300), D0))
    story.step()
    story.tell(PeerDown(worker_id=D0, epoch=1))
    while story.steps:
        story.step()
    assert [f.request_id for f in story.heard(RequestFailed)] == ["late"] or story.worker.is_idle
    story.assert_empty()


def test_only_a_peer_of_this_host_is_written_to() -> None:
    story = Story(P0, handoff=Handoff.PUSH)
    story.tell(assign(request("near", 40), D0))
    (offer,) = story.heard(Offer)
    assert (offer.is_push, offer.num_ready) == (True, 0)
    story.tell(Cancel(request_id=RequestId("near")))
    story.tell(PeerUp(info=replace(info_of(D0), epoch=2, host="another")))
    story.tell(assign(request("far", 40), D0))
    assert not story.heard(Offer)  # it is told when there is something to pull
    while story.steps:
        story.step()
    (offer,) = story.heard(Offer)
    assert (offer.is_push, offer.num_ready) == (False, 39)
