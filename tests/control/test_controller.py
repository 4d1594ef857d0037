"""The controller core as stories: events in, expected commands out."""

from msgspec.structs import replace

from penstock.core.errors import CapacityExceeded, PromptTooLong, WorkersUnavailable
from penstock.core.events import (
    Drain,
    Retire,
    Woken,
    WorkerSuspected,
)
from penstock.core.messages import (
    Assign,
    Cancel,
    PeerDown,
    PeerUp,
    RequestFailed,
    Stop,
    Tokens,
)
from penstock.core.types import FRONT, NS_PER_S, RequestId, WorkerId
from penstock.sim.executor import chain_layout
from tests.control.story import Story, request


def test_a_request_goes_to_a_pair_and_its_tokens_to_the_front() -> None:
    story = Story("p0", "d0")
    story.submit("r")
    ((to, assign),) = story.heard(Assign)
    assert (to, assign.decode_worker) == ("p0", "d0")
    story.offered("p0", "r")
    assert story.controller.status().handing_off == 1
    story.tokens("d0", "r", 5)
    story.tokens("d0", "r", 6, is_last=True)
    assert [(to, m.outputs[0].token_ids) for to, m in story.heard(Tokens)] == [
        (FRONT, (5,)),
        (FRONT, (6,)),
    ]
    assert story.controller.status().finished == 1


def test_the_first_token_may_overtake_the_word_that_it_was_offered() -> None:
    story = Story("p0", "d0")
    story.submit("r")
    story.tokens("d0", "r", 5)
    story.offered("p0", "r")
    assert story.controller.status().decoding == 1


def test_work_is_spread_by_tokens_over_workers_of_a_role() -> None:
    story = Story("p0", "p1", "d0", "d1")
    for name, num_prompt in (("a", 100), ("b", 20), ("c", 20), ("d", 20)):
        story.submit(name, num_prompt)
    pairs = [(to, assign.decode_worker) for to, assign in story.heard(Assign)]
    assert pairs == [("p0", "d0"), ("p1", "d1"), ("p1", "d1"), ("p1", "d1")]


def test_a_prompt_of_one_token_has_nothing_to_hand_off() -> None:
    story = Story("p0", "d0")
    story.submit("r", num_prompt=1)
    ((to, assign),) = story.heard(Assign)
    assert (to, assign.decode_worker) == ("d0", "d0")


def test_a_mixed_worker_serves_alone_and_so_does_what_is_left_of_a_pair() -> None:
    for story, name in ((Story("m0"), "m0"), (Story("p0"), "p0"), (Story("d0"), "d0")):
        story.submit("r")
        ((to, assign),) = story.heard(Assign)
        assert to == assign.decode_worker == name


def test_cancel_reaches_both_workers_and_late_tokens_are_answered() -> None:
    story = Story("p0", "d0")
    story.submit("r")
    story.tell(Cancel(request_id=RequestId("r")))
    assert [to for to, _ in story.heard(Cancel)] == ["p0", "d0"]
    story.tokens("d0", "r", 5)
    assert [to for to, _ in story.heard(Cancel)] == ["d0"]
    assert not story.heard(Tokens)
    story.tell(Cancel(request_id=RequestId("r")))
    assert not story.heard(Cancel)
    assert story.controller.status().aborted == 1


def test_a_lost_decode_worker_is_replaced_and_the_stream_goes_on() -> None:
    story = Story("p0", "d0", "d1")
    story.submit("r")
    story.offered("p0", "r")
    story.tokens("d0", "r", 5)
    story.heard(Assign)
    story.lose("d0")
    assert {to for to, _ in story.heard(PeerDown)} == {"p0", "d1"}
    ((to, assign),) = story.heard(Assign)
    assert (to, assign.decode_worker) == ("p0", "d1")
    assert assign.request.request_id == "r~1"
    assert assign.request.output_token_ids == (5,)
    story.heard(Tokens)
    story.tokens("d0", "r", 99)  # of the attempt that was given up
    story.tokens("d1", "r~1", 6, is_last=True)
    ((_, tokens),) = story.heard(Tokens)
    assert tokens.outputs[0].request_id == "r"
    assert tokens.outputs[0].token_ids == (6,)


def test_a_lost_prefill_worker_matters_only_until_the_first_token() -> None:
    story = Story("p0", "p1", "d0")
    story.submit("a")
    story.tokens("d0", "a", 5)
    story.submit("b")
    story.heard(Assign)
    story.lose("p0")
    assert [m.request.request_id for _, m in story.heard(Assign)] == ["b~1"]


def test_a_request_fails_with_the_reason_when_all_attempts_are_used_up() -> None:
    story = Story("m0", max_attempts=2)
    story.submit("r")
    story.lose("m0")
    story.join("m0", epoch=2)
    story.lose("m0", epoch=2)
    ((to, failed),) = story.heard(RequestFailed)
    assert to == FRONT
    assert "m0 was lost (killed)" in failed.reason
    assert story.controller.status().failed == 1


def test_a_failed_pull_is_retried_and_a_hopeless_failure_is_not() -> None:
    story = Story("p0", "d0")
    story.submit("r")
    story.heard(Assign)
    story.tell(RequestFailed(request_id=RequestId("r"), reason="cut", is_retryable=True))
    assert len(story.heard(Assign)) == 1
    story.tell(RequestFailed(request_id=RequestId("r~1"), reason="bad"))
    ((to, failed),) = story.heard(RequestFailed)
    assert (to, failed.request_id, failed.reason) == (FRONT, "r", "bad")


def test_requests_wait_for_a_first_worker_but_not_for_ever() -> None:
    story = Story()
    story.submit("a")
    story.submit("b")
    story.tell(Cancel(request_id=RequestId("b")))
    assert story.controller.status().queued == 1
    story.join("m0")
    assert [m.request.request_id for _, m in story.heard(Assign)] == ["a"]
    story.lose("m0")
    story.now_ns += 31 * NS_PER_S
    story.tell(Woken("queue"))
    ((_, failed),) = story.heard(RequestFailed)
    assert failed.reason == "no worker came up in time"
    assert story.wakes


def test_what_a_dead_worker_had_is_not_booked_on_its_successor() -> None:
    story = Story("p0", "d0")
    story.submit("r")
    story.tokens("d0", "r", 5)
    story.lose("p0")
    story.join("p0", epoch=2)
    story.tokens("d0", "r", 6, is_last=True)
    assert [w.assigned for w in story.controller.status().workers] == [0, 0]


def test_a_death_that_is_reported_late_does_not_hit_the_successor() -> None:
    story = Story("m0")
    story.lose("m0")
    story.join("m0", epoch=2)
    story.lose("m0", epoch=1)
    assert len(story.controller.workers) == 1


def test_workers_are_introduced_and_a_foreign_layout_is_turned_away() -> None:
    story = Story("p0")
    story.join("d0")
    assert {to for to, _ in story.heard(PeerUp)} == {"p0", "d0"}
    story.join("d1", block_size=32)
    assert not story.heard(Stop)
    story.join("d2", model="another")
    ((to, stop),) = story.heard(Stop)
    assert to == "d2"
    ours, theirs = (chain_layout(16), replace(chain_layout(16), model="another"))
    assert ours.fingerprint() in stop.reason
    assert theirs.fingerprint() in stop.reason


def test_refusals_name_what_to_do() -> None:
    story = Story("m0", max_queued=1)
    assert isinstance(story.controller.refusal(request("long", 300)), PromptTooLong)
    story.submit("r")
    refusal = story.controller.refusal(request("s"))
    assert isinstance(refusal, CapacityExceeded)
    assert refusal.retry_after_s > 0
    story.tell(Drain())
    assert isinstance(story.controller.refusal(request("s")), WorkersUnavailable)
    story.submit("s")
    ((_, failed),) = story.heard(RequestFailed)
    assert failed.request_id == "s"


# ------------------------------------------------------------------- leaving, and being suspected


def retire(name: str, epoch: int = 1) -> Retire:
    return Retire(WorkerId(name), epoch)


def suspect(name: str, *, is_suspected: bool, epoch: int = 1) -> WorkerSuspected:
    return WorkerSuspected(worker_id=WorkerId(name), epoch=epoch, is_suspected=is_suspected)


def test_an_idle_worker_that_retires_is_stopped_at_once_and_others_hear_of_it() -> None:
    story = Story("p0", "d0", "d1")
    story.tell(retire("d1"))
    assert story.heard(Stop) == [("d1", Stop())]
    assert [to for to, _ in story.heard(PeerDown)] == ["p0", "d0"]
    assert set(story.controller.workers) == {"p0", "d0"}


def test_a_decode_worker_that_retires_finishes_what_it_has_and_gets_nothing_new() -> None:
    story = Story("p0", "d0", "d1")
    story.submit("a")
    story.tell(retire("d0"))
    assert story.pairs() == [("p0", "d0")]
    story.submit("b")
    assert story.pairs() == [("p0", "d1")]
    story.offered("p0", "a")
    story.tokens("d0", "a", 1)
    assert not story.heard(Stop)
    assert story.controller.status().workers[1].is_leaving
    story.tokens("d0", "a", 2, is_last=True)
    assert story.heard(Stop) == [("d0", Stop())]


def test_a_prefill_worker_that_retires_waits_for_its_blocks_to_be_pulled() -> None:
    story = Story("p0", "p1", "d0")
    story.submit("a")
    story.tell(retire("p0"))
    story.offered("p0", "a")
    assert not story.heard(Stop)
    story.tokens("d0", "a", 1)
    assert story.heard(Stop) == [("p0", Stop())]
    story.tokens("d0", "a", 2, is_last=True)
    assert story.controller.status().finished == 1


def test_a_word_about_another_incarnation_is_ignored() -> None:
    story = Story("p0", "d0")
    story.tell(retire("d0", epoch=2))
    story.tell(suspect("d0", is_suspected=True, epoch=2))
    (_, worker) = story.controller.status().workers
    assert not worker.is_leaving
    assert not worker.is_suspected


def test_the_last_one_to_leave_leaves_requests_queued() -> None:
    story = Story("m0")
    story.tell(retire("m0"))
    story.submit("a")
    assert story.controller.status().queued == 1
    story.join("m1")
    assert story.pairs() == [("m1", "m1")]


def test_a_suspected_worker_gets_nothing_while_there_is_another() -> None:
    story = Story("p0", "d0", "d1")
    story.tell(suspect("d0", is_suspected=True))
    story.submit("a")
    assert story.pairs() == [("p0", "d1")]
    story.lose("d1")
    # Now there is nobody else of its role: it may yet be alive.
    assert story.controller.status().workers[1].is_suspected
    story.tell(suspect("d0", is_suspected=False))
    story.heard(Assign)
    story.submit("b")
    assert story.pairs() == [("p0", "d0")]
