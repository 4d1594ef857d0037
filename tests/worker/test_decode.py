"""The decode worker's half of the hand-off, as stories."""

import pytest

from penstock.core.events import Woken
from penstock.core.messages import (
    Cancel,
    Migrate,
    Offer,
    PeerDown,
    Progress,
    Release,
    Renew,
    Tokens,
    Withdraw,
)
from penstock.core.types import RequestId, WorkerId
from tests.worker.story import COPY_NS, D0, P0, Story, assign, offer_of, request, streamed_to_d0


def test_an_offer_is_pulled_released_and_continued() -> None:
    story = Story(D0)
    offer = offer_of("r", 40, max_tokens=1)
    story.tell(offer)
    (span,) = story.moves[0].move.spans[0]
    assert span.num_blocks == 3
    assert not story.steps
    story.land()
    (release,) = story.heard(Release)
    assert release.request_id == "r"
    step = story.step()
    assert (step.num_new.tolist(), step.num_computed.tolist()) == ([1], [39])
    (tokens,) = story.heard(Tokens)
    parts = tokens.outputs[0].timeline.ledger(delivered_ns=story.now_ns)
    assert sum(v for k, v in parts.items() if k != "ttft") == pytest.approx(parts["ttft"])
    story.assert_empty()


def test_parts_are_pulled_as_they_are_finished_and_run_when_all_have_landed() -> None:
    story = Story(D0)
    offer, *progress = streamed_to_d0("r", 40, max_tokens=1)
    story.tell(offer)
    story.tell(progress[1])  # too early: what lies before it is not known yet
    assert len(story.moves) == 1
    story.tell(progress[0])
    story.tell(progress[0])
    story.heard(Renew)
    story.tell(Woken("renew"))
    (renew,) = story.heard(Renew)
    assert renew.num_ready == (32,)
    story.tell(progress[1])
    spans = [move.move.spans[0] for move in story.moves]
    assert [span.num_blocks for (span,) in spans] == [1, 1, 1]
    destinations = [span.destination for (span,) in spans]
    assert destinations == list(range(destinations[0], destinations[0] + 3))  # one run
    for _ in range(3):
        assert not story.steps
        assert not story.heard(Release)
        story.land()
    assert story.heard(Release)
    assert story.step().num_computed.tolist() == [39]
    (tokens,) = story.heard(Tokens)
    timeline = tokens.outputs[0].timeline
    assert timeline.pull_moves == 3
    assert timeline.pull_copy_ns == 3 * COPY_NS
    assert timeline.pull_bytes_per_s == pytest.approx(timeline.pull_bytes / (3 * COPY_NS / 1e9))
    parts = timeline.ledger(delivered_ns=story.now_ns)
    assert min(parts.values()) >= 0
    story.assert_empty()


def test_an_offer_that_was_lost_is_asked_for_when_there_is_progress() -> None:
    prefill, decode = Story(P0, max_num_batched_tokens=18), Story(D0)
    prefill.tell(assign(request("r", 40, max_tokens=1), D0))
    prefill.step()
    prefill.heard(Offer)
    prefill.step()
    (progress,) = prefill.heard(Progress)
    decode.tell(progress)
    (ask,) = decode.heard(Renew)
    prefill.tell(ask)
    (offer,) = prefill.heard(Offer)
    assert offer.num_ready == 32
    decode.tell(offer)
    assert [span.num_blocks for span in decode.moves[0].move.spans[0]] == [2]


@pytest.mark.parametrize("end", ["corrupt", "cancel", "withdraw", "peer_down"])
def test_what_is_being_copied_is_let_finish_before_its_blocks_are_free(end: str) -> None:
    story = Story(D0)
    offer, progress, _last = streamed_to_d0("r", 40, max_tokens=1)
    story.tell(offer)
    story.tell(progress)
    match end:
        case "corrupt":
            story.land(is_corrupt=True)  # comes again, behind the other part
            story.land()
            story.land(is_corrupt=True)
        case "cancel":
            story.tell(Cancel(request_id=RequestId("r")))
        case "withdraw":
            story.tell(Withdraw(request_id=RequestId("r"), source=P0))
        case "peer_down":
            story.tell(PeerDown(worker_id=P0, epoch=1))
    if end == "corrupt":
        assert story.step().num_new.tolist() == [40]
    else:
        assert not story.worker.is_idle
        story.land()
        story.land()
    assert len(story.heard(Release)) == 1
    story.assert_empty()


def test_an_offer_that_is_complete_comes_in_before_one_that_is_not() -> None:
    story = Story(D0, num_blocks=5)
    story.tell(offer_of("first", 40, max_tokens=1))
    story.tell(streamed_to_d0("part", 41, start=200, max_tokens=1)[0])
    story.tell(offer_of("whole", 42, start=300, max_tokens=1))
    story.land()
    story.step()
    assert [m.move.request_id for m in story.moves] == ["whole"]
    story.land()
    story.step()
    assert [m.move.request_id for m in story.moves] == ["part"]
    story.tell(Cancel(request_id=RequestId("part")))
    story.land()
    story.assert_empty()


def test_blocks_that_are_here_already_are_not_pulled_again() -> None:
    story = Story(D0)
    for name in ("r", "again"):
        story.tell(offer_of(name, 40, max_tokens=1))
        sizes = [span.num_blocks for span in story.moves[0].move.spans[0]]
        story.land()
        story.step()
    assert sum(sizes) == 1  # the tail alone: two full blocks were cached by the first


def test_a_running_decode_goes_on_at_another_worker() -> None:
    old, new = Story(P0), Story(D0)
    old.tell(assign(request("r", 40, max_tokens=30), P0))
    for _ in range(4):
        old.step()
    old.tell(Migrate(request_id=RequestId("r"), decode_worker=D0))
    assert not old.heard(Offer)  # a step is under way
    old.step()
    (offer,) = old.heard(Offer)
    tokens = [t for message in old.heard(Tokens) for o in message.outputs for t in o.token_ids]
    assert offer.request.output_token_ids == tuple(tokens) == (5,) * 5
    assert offer.num_tokens == offer.num_ready == 44
    new.tell(offer)
    assert new.moves[0].move.digests[0][:2] == offer.groups[0].digests[:2]
    new.land()
    (release,) = new.heard(Release)
    old.tell(release)
    old.assert_empty()
    assert new.step().num_computed.tolist() == [44]
    while new.steps:
        new.step()
    outputs = [o for message in new.heard(Tokens) for o in message.outputs]
    assert len(tokens) + len(outputs) == 30
    assert outputs[0].timeline is None  # its client has the first token already
    new.assert_empty()


@pytest.mark.parametrize("moment", ["prefill", "ended", "unknown_peer"])
def test_what_cannot_go_on_elsewhere_stays(moment: str) -> None:
    story = Story(P0, max_num_batched_tokens=16)
    story.tell(assign(request("r", 40, max_tokens=3), P0))
    if moment == "ended":
        while story.steps:
            story.step()
    peer = WorkerId("nobody") if moment == "unknown_peer" else D0
    story.tell(Migrate(request_id=RequestId("r"), decode_worker=peer))
    while story.steps:
        story.step()
    assert not story.heard(Offer)
    outputs = [o for message in story.heard(Tokens) for o in message.outputs]
    assert len(outputs) == 3
    story.assert_empty()


def test_an_offer_waits_for_room_and_then_comes_in() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("first", 40, max_tokens=2))
    story.tell(offer_of("second", 41, max_tokens=1))
    assert len(story.moves) == 1
    story.land()
    story.step()
    story.step()
    assert len(story.moves) == 1
    assert story.worker.load().waiting == 0


def test_what_cannot_be_pulled_is_computed_here() -> None:
    story = Story(D0)
    story.tell(offer_of("r", 40, max_tokens=1))
    story.land(error="link cut")
    assert story.heard(Release)
    assert story.step().num_new.tolist() == [40]
    assert story.heard(Tokens)
    assert story.worker.load().pulls_recomputed == 1
    story.assert_empty()


def test_what_is_corrupt_is_pulled_once_more_and_then_computed_here() -> None:
    for num_corrupt in (1, 2):
        story = Story(D0)
        story.tell(offer_of("r", 40, max_tokens=1))
        for _ in range(num_corrupt):
            story.land(is_corrupt=True)
        if num_corrupt == 1:
            story.land()
        (release,) = story.heard(Release)
        assert release.is_spoiled == (num_corrupt == 2)
        assert story.step().num_new.tolist() == [1 if num_corrupt == 1 else 40]
        load = story.worker.load()
        assert (load.pulls_corrupt, load.pulls_recomputed) == (num_corrupt, num_corrupt - 1)
        story.assert_empty()


def test_leases_are_renewed_while_offers_wait_or_are_pulled_and_no_longer() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("pulled", 40, max_tokens=1))
    story.tell(offer_of("waits", 41, max_tokens=1))
    story.tell(Woken("renew"))
    (renew,) = story.heard(Renew)
    assert set(renew.request_ids) == {"pulled", "waits"}
    story.land()
    story.step()
    story.land()
    story.step()
    story.tell(Woken("renew"))
    assert not story.heard(Renew)
    story.assert_empty()


def test_an_offer_that_comes_twice_or_too_late_is_released_and_not_run_again() -> None:
    story = Story(D0)
    offer = offer_of("r", 40, max_tokens=2)
    story.tell(offer)
    story.tell(offer)
    assert len(story.moves) == 1
    story.land()
    story.heard(Release)
    story.tell(offer)
    assert story.heard(Release)
    story.step()
    story.step()
    story.heard(Tokens)
    story.tell(offer)
    assert story.heard(Release)
    assert not story.steps
    story.assert_empty()


@pytest.mark.parametrize("moment", ["pending", "pulling", "in_step", "unknown"])
@pytest.mark.parametrize("by", ["controller", "prefill_worker"])
def test_cancel_on_the_decode_worker(moment: str, by: str) -> None:
    story = Story(D0, num_blocks=3)
    if moment == "pending":
        story.tell(offer_of("other", 41, max_tokens=1))
    if moment != "unknown":
        story.tell(offer_of("r", 40))
    if moment == "in_step":
        story.land()
        story.heard(Release)
    cancel = (
        Cancel(request_id=RequestId("r"))
        if by == "controller"
        else Withdraw(request_id=RequestId("r"), source=P0)
    )
    story.tell(cancel)
    if moment in ("pending", "pulling"):
        story.land()
    if moment in ("pending", "in_step"):
        story.step()
    released = [r for r in story.heard(Release) if r.request_id == "r"]
    is_owed = moment in ("pending", "pulling") or by == "prefill_worker"
    assert bool(released) == is_owed
    outputs = [o for t in story.heard(Tokens) for o in t.outputs if o.request_id == "r"]
    # What is ours already is for the controller to call off, not for the prefill worker.
    is_ours = moment == "in_step" and by == "prefill_worker"
    assert bool(outputs) == is_ours
    if is_ours:
        story.tell(Cancel(request_id=RequestId("r")))
        story.step()
    story.assert_empty()


def test_a_dead_prefill_worker_s_offers_are_forgotten_and_its_pulls_finished() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("pulled", 40, max_tokens=1))
    late = offer_of("waits", 41)
    story.tell(late)
    story.tell(PeerDown(worker_id=P0, epoch=1))
    story.tell(late)
    assert not story.worker.pulls.pending
    assert story.worker.pulls.num_admitted == 1
    story.land()
    story.step()
    assert story.heard(Tokens)
    story.assert_empty()
