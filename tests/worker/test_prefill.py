"""The prefill worker's half of the hand-off, as stories."""

import pytest

from penstock.core.events import Woken
from penstock.core.messages import (
    Cancel,
    Expired,
    Offer,
    Offered,
    PeerDown,
    Release,
    Renew,
    RequestFailed,
    Withdraw,
)
from penstock.core.types import RequestId
from tests.worker.story import D0, P0, Story, assign, offer_of, request


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


def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.step()
    lease_ns = story.worker.config.lease_ns
    story.now_ns += lease_ns // 2
    story.tell(Renew(request_ids=(RequestId("r"), RequestId("unknown")), worker_id=D0))
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
