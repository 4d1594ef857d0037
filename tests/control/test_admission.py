"""Who is taken, who is refused and with what advice, and who is given up."""

import pytest

from penstock.core.errors import CapacityExceeded
from penstock.core.events import Woken
from penstock.core.messages import Assign, RequestFailed
from penstock.core.types import FRONT
from tests.control.story import Story, request

LONG = 3000
OWN_MS = 53.0
"""Prefill of such a prompt on an H100."""


def make(*names: str, **settings: object) -> Story:
    return Story(*names, num_blocks=4096, policy="predicted", **settings)


def flood(story: Story, count: int, **more: object) -> None:
    for number in range(count):
        story.submit(f"f{number}", LONG, **more)


def test_what_would_be_late_is_refused_with_the_time_until_it_would_not() -> None:
    story = make("p0", "d0", slo_ttft_ms=300.0)
    for number in range(20):
        refusal = story.controller.refusal(request("x", LONG))
        if refusal is not None:
            break
        story.submit(f"f{number}", LONG)
    assert isinstance(refusal, CapacityExceeded)
    # Prefills of 53 ms within 300 ms, on p0 and, once that is busy, on d0 as well.
    assert 5 <= number <= 10
    assert 0.1 <= refusal.retry_after_s < 0.3
    story.submit("x", LONG)
    ((to, failed),) = story.heard(RequestFailed)
    assert (to, failed.request_id) == (FRONT, "x")
    assert failed.retry_after_s == refusal.retry_after_s
    # It is honest: after that time, and what was done in it, the same request is taken.
    story.now_ns += int(refusal.retry_after_s * 1e9)
    for done in range(3):
        story.offered("p0", f"f{done}")
    assert story.controller.refusal(request("x", LONG)) is None


def test_those_that_were_taken_are_predicted_to_be_in_time() -> None:
    story = make("p0", "d0", slo_ttft_ms=300.0)
    flood(story, 20)
    taken = [assign.request.request_id for _, assign in story.heard(Assign)]
    assert taken
    for name in taken:
        explained = story.controller.explain(name)
        assert explained is not None
        assert explained.predicted.ttft_ms <= 300


def test_a_request_may_ask_for_more_or_less_than_the_cluster_promises() -> None:
    story = make("p0", "d0", slo_ttft_ms=100.0)
    flood(story, 8)
    assert story.controller.refusal(request("x", LONG)) is not None
    assert story.controller.refusal(request("x", LONG, slo_ttft_ms=10_000.0)) is None
    story = make("p0", "d0")
    flood(story, 8)
    assert story.controller.refusal(request("x", LONG)) is None
    assert story.controller.refusal(request("x", LONG, slo_ttft_ms=100.0)) is not None


def test_nobody_is_late_while_the_cluster_comes_up() -> None:
    story = make(slo_ttft_ms=1.0)
    assert story.controller.refusal(request("x", LONG)) is None


def test_a_full_queue_gives_up_the_least_urgent_for_a_more_urgent_one() -> None:
    story = make("p0", "d0", max_queued=12)
    flood(story, 12, priority=5)
    queued = story.controller.status().queued
    assert queued > 0
    assert isinstance(story.controller.refusal(request("x", LONG, priority=5)), CapacityExceeded)
    assert story.controller.refusal(request("x", LONG, priority=1)) is None
    story.submit("x", LONG, priority=1)
    ((_, failed),) = story.heard(RequestFailed)
    assert failed.request_id == "f11"
    assert failed.retry_after_s is not None
    assert story.controller.status().queued == queued
    story.heard(Assign)
    story.offered("p0", "f0")
    story.tokens("d0", "f0", 1, is_last=True)
    assert story.heard(Assign)[0][1].request.request_id == "x"


def test_the_advice_of_a_full_server_grows_with_what_is_ahead() -> None:
    advice = []
    for limit in (8, 16, 64):
        story = make("p0", "d0", max_queued=limit)
        flood(story, limit)
        refusal = story.controller.refusal(request("x", LONG))
        assert isinstance(refusal, CapacityExceeded)
        advice.append(refusal.retry_after_s)
    assert advice[0] < advice[1] < advice[2]
    assert advice[2] == pytest.approx(64 * OWN_MS / 1e3, rel=0.5)


def test_waiting_for_room_ends_too() -> None:
    story = make("p0", "d0", wait_timeout_ns=50 * 10**9)
    flood(story, 20)
    queued = story.controller.status().queued
    assert queued > 0
    story.now_ns += 40 * 10**9
    story.tell(Woken("queue"))
    assert story.controller.status().queued == queued
    story.now_ns += 20 * 10**9
    story.tell(Woken("queue"))
    assert story.controller.status().queued == 0
    assert {m.reason for _, m in story.heard(RequestFailed)} == {"no worker had room in time"}


def test_those_that_wait_take_as_long_whoever_asks() -> None:
    story = make("p0", "d0")
    flood(story, 30)
    admission = story.controller.admission
    assert len(admission.queue) > 10
    short = admission.wait_ns(request("x", 100), story.now_ns)
    assert short == pytest.approx(admission.wait_ns(request("x", LONG), story.now_ns))
    assert short >= len(admission.queue) * OWN_MS * 1e6 * 0.9
