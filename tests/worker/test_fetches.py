"""Who waits for blocks, since when, and what came of what was wished for."""

from penstock.core.events import MoveClass, SubmitMove, WakeAt, Woken
from penstock.core.messages import Cancel, Tokens
from penstock.core.tiers import PrefetchLoad, TierConfig
from penstock.core.types import NS_PER_S, RequestId
from tests.worker.story import P0, assign, request
from tests.worker.test_tiers import DISK, DRAM, Below

SLOTS = TierConfig(name="dram", num_slots=64, bytes_per_s=10_000_000_000)


def ask(below: Below, name: str, start: int, num_prompt: int = 40, **params: float) -> None:
    below.story.tell(assign(request(name, num_prompt, start=start, max_tokens=1), P0))


def busy_with_one_seat() -> Below:
    """A worker with one seat, which is taken; what it had has fallen out of its pool."""
    below = Below(SLOTS, max_num_seqs=1)
    below.run("a", 100)
    below.run("b", 500)
    below.run("other", 1000, 100)
    ask(below, "long", 3000, 20)
    assert len(below.story.steps) == 1
    return below


def prefetches(below: Below) -> PrefetchLoad:
    found = below.story.worker.load().prefetches
    assert found is not None
    return found


def kinds(below: Below) -> list[MoveClass]:
    return [submit.move.kind for submit in below.story.moves]


def test_what_comes_while_others_compute_is_no_exposed_time() -> None:
    below = busy_with_one_seat()
    ask(below, "a again", 100)
    assert kinds(below) == [MoveClass.PREFETCH]
    below.land()
    assert prefetches(below) == PrefetchLoad(num_used=1)
    below.story.step()
    assert below.story.steps[0].num_computed.tolist() == [32]
    assert below.load().exposed_ns == 0
    below.story.step()
    below.move_all()
    below.story.assert_empty()
    below.assert_nothing_held()


def test_when_its_turn_comes_first_it_is_late_urgent_and_exposed_from_then_on() -> None:
    below = busy_with_one_seat()
    ask(below, "a again", 100)
    ask(below, "b again", 500)
    # One link: the second waits behind the first, and both are needed now.
    assert kinds(below) == [MoveClass.PREFETCH]
    below.story.step()
    turn_ns = below.story.now_ns
    below.story.now_ns += 1_000_000
    below.land()
    assert prefetches(below).num_late == 1
    exposed_ns = below.story.now_ns - turn_ns
    assert below.load().exposed_ns == exposed_ns
    while below.story.steps or below.story.moves:
        below.move_all()
        below.story.step()
    (first, *_) = [
        output.timeline
        for message in below.story.heard(Tokens)
        for output in message.outputs  # type: ignore[attr-defined]
        if output.request_id == "a again"
    ]
    assert first is not None
    assert first.exposed_ns == exposed_ns
    below.move_all()
    below.story.assert_empty()
    below.assert_nothing_held()


def test_what_is_cancelled_before_its_move_begins_is_taken_back() -> None:
    below = busy_with_one_seat()
    ask(below, "a again", 100)
    ask(below, "b again", 500)
    below.story.tell(Cancel(request_id=RequestId("b again")))
    below.land()
    assert not below.story.moves, "the second has never begun"
    assert prefetches(below) == PrefetchLoad(num_used=1, num_wasted=1)
    while below.story.steps:
        below.story.step()
    below.move_all()
    below.story.assert_empty()
    below.assert_nothing_held()


def pause_twice(below: Below) -> int:
    """A session of three turns, ten seconds apart; return when the next but one is to be begun."""
    story = below.story
    for turn, length in enumerate((40, 56)):
        below.run(f"turn{turn}", 100, length)
        story.now_ns += 10 * NS_PER_S
    below.run("turn2", 100, 72)
    below.run("other", 1000, 100)
    (asked,) = [wake for wake in story.asked if wake.at_ns > story.now_ns]
    assert isinstance(asked, WakeAt)
    return asked.at_ns


def test_a_session_that_pauses_as_before_finds_its_blocks_in_the_pool() -> None:
    below = Below(SLOTS, num_blocks=14)
    at_ns = pause_twice(below)
    story = below.story
    below.run("another", 2000, 120)
    story.now_ns = at_ns
    story.tell(Woken("tiers"))
    assert kinds(below) == [MoveClass.PREFETCH]
    below.move_all()
    hits = below.load().num_hits
    assert hits > 0
    assert below.run("turn3", 100, 88) == 64
    assert prefetches(below).num_used == 1
    assert below.load().num_hits == hits
    assert below.load().exposed_ns == 0


def test_what_was_expected_and_did_not_come_is_wasted_once_it_is_given_up() -> None:
    below = Below(SLOTS, num_blocks=14)
    at_ns = pause_twice(below)
    below.run("another", 2000, 120)
    below.story.now_ns = at_ns
    below.story.tell(Woken("tiers"))
    below.move_all()
    for number in range(3):
        below.run(f"more{number}", 4000 + 1000 * number, 120)
    assert prefetches(below).num_wasted == 1


def test_a_prefix_is_brought_from_near_and_computed_where_it_lies_far() -> None:
    far = TierConfig(name="disk", num_slots=8, bytes_per_s=1, latency_ns=10 * NS_PER_S)
    below = Below(TierConfig(name="dram", num_slots=10, bytes_per_s=10_000_000_000), far)
    tiers = below.story.worker.tiers
    tiers.note_step(100, 100_000 * NS_PER_S)  # so slow that even the far tier is worth it
    below.run("a", 100, 100)  # six blocks
    below.run("other", 1000, 100)  # pushes the end of it down
    below.run("more", 2000, 20)
    assert 0 < below.load(1).num_used < 6
    for _ in range(100):
        tiers.note_step(100, 10_000_000)
    found = below.run("a again", 100, 100)
    assert 0 < found < 96
    assert below.load(1).num_hits == 0


def test_a_request_for_what_is_being_brought_waits_for_the_same_move() -> None:
    below = Below(DRAM, DISK)
    below.run("a", 100)
    below.run("other", 1000, 100)
    ask(below, "one", 100)
    ask(below, "two", 100)
    (submit,) = below.story.moves
    assert isinstance(submit, SubmitMove)
    below.land()
    assert below.story.steps[0].num_computed.tolist() == [32, 32]


def test_who_waited_for_blocks_is_not_behind_those_that_came_meanwhile() -> None:
    below = busy_with_one_seat()
    ask(below, "a again", 100)
    ask(below, "later", 7000)
    below.land()
    names = [sequence.request_id for sequence in below.story.worker.scheduler.waiting]
    assert names == ["a again", "later"]
    while below.story.steps:
        below.story.step()
        below.move_all()
    below.story.assert_empty()
    below.assert_nothing_held()
