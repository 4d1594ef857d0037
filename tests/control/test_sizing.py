"""Workers come when the cluster is full for a while, and go when they were of no use for longer."""

import pytest

from penstock.control.sizing import GROW_LOOKS
from penstock.core.events import Retire, SetRole, WorkerLost
from penstock.core.messages import Resize
from penstock.core.types import FRONT, Role, WorkerId
from tests.control.story import Story
from tests.control.test_roles import LONG, make, press, roles

MOST = 4
LIMITS = {
    "workers_min": 2,
    "workers_max": MOST,
    "resize_pause_ms": 5000.0,
    "retire_after_ms": 10_000.0,
}


def elastic(*names: str, **settings: object) -> Story:
    return make(*names, **(LIMITS | settings))


def resizes(story: Story) -> list[Resize]:
    """Return and forget what the runtime was asked for."""
    heard = story.heard(Resize)
    assert {to for to, _ in heard} <= {FRONT}
    return [message for _, message in heard if isinstance(message, Resize)]


def obey(story: Story) -> list[Resize]:
    """Do what the runtime is asked for, as it would."""
    asked = resizes(story)
    for one in asked:
        for role in one.start:
            numbers = range(MOST + 1)
            names = (f"{role.value[0]}{n}" for n in numbers)
            story.join(next(n for n in names if n not in story.controller.workers))
        if one.retire is not None:
            story.tell(Retire(one.retire, 1))
    return asked


def rest(story: Story, seconds: int) -> list[Resize]:
    """Let nothing happen, and the runtime obey."""
    asked = []
    for _ in range(seconds):
        story.pass_time(1000, "roles")
        asked += obey(story)
    return asked


def finish(story: Story) -> None:
    """End every request, wherever it is."""
    for record in list(story.controller.requests.values()):
        if record.decode is not None:
            worker = record.decode.info.worker_id
            story.tokens(worker, record.wire_id, 1, is_last=True)
    assert not story.controller.requests


def test_prompts_that_pile_up_start_prefill_workers_up_to_the_limit() -> None:
    story = elastic("p0", "d0")
    press(story, GROW_LOOKS - 1, 15)
    assert resizes(story) == []
    press(story, 1, 15)
    (asked,) = obey(story)
    assert asked.start == (Role.PREFILL, Role.PREFILL)  # as many again as there are
    assert "prefill load" in asked.reason
    assert sorted(roles(story)) == ["d", "p", "p", "p"]
    press(story, 20, 15)
    assert obey(story) == []  # all that may be are there
    limits = story.controller.status().limits
    assert (limits.least, limits.most, limits.started, limits.retired) == (2, MOST, 2, 0)


def test_what_was_asked_for_has_time_to_come_up() -> None:
    story = elastic("p0", "d0", workers_max=3)
    press(story, GROW_LOOKS, 15)
    assert len(resizes(story)) == 1
    for _ in range(58):
        story.pass_time(1000, "roles")
    assert resizes(story) == []
    for _ in range(GROW_LOOKS + 2):
        story.pass_time(1000, "roles")
    assert len(resizes(story)) == 1  # it has not come


def test_a_worker_that_can_change_sides_comes_before_a_new_one() -> None:
    story = elastic("p0", "d0", "d1", "d2", workers_max=8)
    story.submit("first", LONG, max_tokens=2)
    press(story, 6, 4)
    assert story.controller.status().flips
    if story.controller.roles.loads.worst < 1:
        assert resizes(story) == []


def test_who_has_been_idle_for_long_is_retired_and_the_least_stay() -> None:
    story = elastic("p0", "d0")
    press(story, GROW_LOOKS, 15)
    obey(story)
    finish(story)
    assert rest(story, 10) == []
    asked = rest(story, 60)
    assert [one.retire is not None for one in asked] == [True, True]
    assert sorted(roles(story)) == ["d", "p"]
    assert "for 10 s" in asked[0].reason
    assert story.controller.status().limits.retired == 2
    num_wakes = len([w for w in story.wakes if w.key == "roles"])
    story.pass_time(1000, "roles")  # nobody is left to be retired: it looks no more
    assert len([w for w in story.wakes if w.key == "roles"]) == num_wakes


def test_the_idlest_goes() -> None:
    story = elastic("p0", "p1", "d0", retire_after_ms=3000.0)
    story.submit("r", LONG, max_tokens=2)
    ((prefill, decode),) = story.pairs()
    assert decode == "d0"
    asked = rest(story, 20)
    assert [one.retire for one in asked] == [{"p0": "p1", "p1": "p0"}[prefill]]


def test_a_pinned_worker_and_the_last_of_a_side_stay() -> None:
    story = elastic("p0", "p1", "d0", "d1", workers_min=1, retire_after_ms=2000.0)
    for name in ("p0", "p1"):
        story.tell(SetRole(worker_id=WorkerId(name), role=None, is_pinned=True))
    story.submit("r", 100, max_tokens=2)
    finish(story)
    asked = rest(story, 60)
    assert [one.retire for one in asked] in (["d0"], ["d1"])
    assert sorted(roles(story)) == ["d", "p", "p"]


def test_workers_that_do_both_are_as_full_as_their_two_kinds_of_work() -> None:
    story = elastic("m0", workers_min=1)
    press(story, GROW_LOOKS, 15)
    (asked,) = obey(story)
    assert asked.start == (Role.MIXED,)
    finish(story)
    assert len(rest(story, 60)) == 1
    assert roles(story) == "m"


def test_a_death_is_not_a_reason_to_start_one_by_ourselves() -> None:
    """The runtime replaces who dies; nobody is asked for while the load is what it was."""
    story = elastic("p0", "p1", "d0")
    story.submit("r", 100, max_tokens=2)
    story.tell(WorkerLost(worker_id=WorkerId("p1"), epoch=1, reason="killed"))
    assert not [r for r in rest(story, 5) if r.start]


@pytest.mark.parametrize("is_switching", [True, False])
def test_it_does_not_go_back_and_forth(is_switching: bool) -> None:
    """An even load that is too much for two: one change or two, then peace."""
    story = elastic("p0", "d0", is_switching_roles=is_switching, workers_max=6)
    num_asked = 0
    for second in range(120):
        for number in range(6):
            story.submit(f"{second}-{number}", LONG, max_tokens=2)
        story.pass_time(900, "roles")
        num_asked += len(obey(story))
        finish_some = list(story.controller.requests.values())[:7]
        for record in finish_some:
            if record.decode is not None:
                story.tokens(record.decode.info.worker_id, record.wire_id, 1, is_last=True)
    assert num_asked <= 3
