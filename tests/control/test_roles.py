"""Roles follow the load, not every wave of it; a flip keeps what the worker has."""

import pytest

from penstock.control.roles import LOOKS_MIN, Loads, Regime
from penstock.core.events import SetRole
from penstock.core.types import Role, WorkerId
from tests.control.story import Story

LONG = 3000


def make(*names: str, max_num_seqs: int = 1024, **settings: object) -> Story:
    more = {"is_switching_roles": True, "usual_ttft_ms": 500.0, "admit_backlog_ms": 1e6}
    story = Story(num_blocks=1 << 18, policy="predicted", **(more | settings))
    for name in names:
        story.join(name, max_num_seqs=max_num_seqs)
    story.said.clear()
    return story


def roles(story: Story) -> str:
    return "".join(w.role.value[0] for w in story.controller.status().workers)


def press(story: Story, seconds: int, per_second: int) -> None:
    """Let long prompts come in, none of which is ever done."""
    for second in range(seconds):
        for number in range(per_second):
            story.submit(f"{story.now_ns}-{second}-{number}", LONG, max_tokens=2)
        story.pass_time(1000, "roles")


def test_prompts_that_pile_up_turn_an_idle_decode_worker() -> None:
    story = make("p0", "d0", "d1", "d2")
    press(story, LOOKS_MIN - 1, 15)
    assert roles(story) == "pddd"
    press(story, 2, 15)
    assert roles(story).count("p") == 2
    assert story.controller.status().flips == 1
    flipped = next(w for w in story.controller.workers.values() if w.role is not w.info.role)
    story.heard(object)
    story.submit("next", LONG, max_tokens=2)
    assert {to for to, _ in story.pairs()} <= {"p0", flipped.info.worker_id}


def test_a_flip_is_not_taken_back_at_once_and_the_next_one_waits() -> None:
    story = make("p0", "d0", "d1", "d2", role_cooldown_ms=10_000.0)
    press(story, LOOKS_MIN + 1, 15)
    assert roles(story).count("p") == 2
    press(story, 3, 30)
    assert roles(story).count("p") == 2
    press(story, 8, 30)
    assert roles(story).count("p") == 3


def test_no_side_becomes_empty() -> None:
    story = make("p0", "d0", role_cooldown_ms=0.0)
    press(story, 20, 15)
    assert roles(story) == "pd"
    story = make("p0", "d0", "d1", role_cooldown_ms=0.0)
    press(story, 40, 15)
    assert roles(story).count("d") == 1


def test_prompts_that_wait_for_room_to_decode_do_not_call_for_more_prefill_workers() -> None:
    story = make("p0", "p1", "d0", max_num_seqs=8)
    for second in range(8):
        press(story, 1, 15)
        for name, record in list(story.controller.requests.items()):
            if record.prefill is not None and record.prefill is not record.decode:
                story.offered(record.prefill.info.worker_id, name)
        if second < LOOKS_MIN - 1:
            assert roles(story) == "ppd"
    assert len(story.controller.admission.queue) > 0
    assert roles(story).count("d") == 2
    assert story.controller.roles.loads.decode > 1


def test_a_wave_is_over_before_anybody_moves() -> None:
    story = make("p0", "d0", "d1")
    press(story, LOOKS_MIN - 1, 15)
    for name in list(story.controller.requests):
        story.offered("p0", name)
    for _ in range(6):
        story.pass_time(1000, "roles")
    assert roles(story) == "pdd"


def test_a_pinned_worker_stays_and_a_person_may_do_anything() -> None:
    story = make("p0", "d0", "d1", role_cooldown_ms=0.0)
    for name in ("d0", "d1"):
        story.tell(SetRole(worker_id=WorkerId(name), role=None, is_pinned=True))
    press(story, 10, 15)
    assert roles(story) == "pdd"
    story.tell(SetRole(worker_id=WorkerId("d0"), role=Role.PREFILL, is_pinned=True))
    assert roles(story) == "ppd"
    story.tell(SetRole(worker_id=WorkerId("d0"), role=None, is_pinned=False))
    status = story.controller.status()
    assert [w.is_pinned for w in status.workers] == [False, False, True]
    story.tell(SetRole(worker_id=WorkerId("nobody"), role=Role.PREFILL))


def test_a_flip_holds_from_the_next_assignment_and_keeps_the_prefixes() -> None:
    story = make("p0", "d0", "d1")
    story.has_blocks("d1", 2000)
    story.tell(SetRole(worker_id=WorkerId("d1"), role=Role.PREFILL))
    story.submit("r", LONG)
    assert story.pairs() == [("d1", "d0")]
    explained = story.controller.explain("r")
    assert explained is not None
    best = next(c for c in explained.candidates if c.part == "prefill")
    assert (best.worker_id, best.cached_tokens) == ("d1", 2000)


def test_sequences_that_decode_where_prompts_come_in_now_end_there() -> None:
    story = make("p0", "d0", "d1")
    story.submit("r", LONG)
    ((_, decode),) = story.pairs()
    story.offered("p0", "r")
    story.tokens(decode, "r", 1)
    story.tell(SetRole(worker_id=WorkerId(decode), role=Role.PREFILL))
    story.tokens(decode, "r", 2, is_last=True)
    assert story.controller.status().finished == 1


def test_it_is_off_unless_asked_for_and_looks_only_while_there_is_work() -> None:
    story = make("p0", "d0", "d1", is_switching_roles=False)
    story.submit("r", LONG)
    assert not [w for w in story.wakes if w.key == "roles"]
    story = make("p0", "d0", "d1")
    story.submit("r", LONG)
    assert len([w for w in story.wakes if w.key == "roles"]) == 1
    story.offered("p0", "r")
    story.tokens("d0", "r", 1, is_last=True)
    story.pass_time(1000, "roles")
    assert len([w for w in story.wakes if w.key == "roles"]) == 1
    story.submit("s", LONG)
    assert len([w for w in story.wakes if w.key == "roles"]) == 2


@pytest.mark.parametrize(
    ("prefill", "decode", "regime"),
    [
        (0.9, 0.9, Regime.NORMAL),
        (1.2, 0.4, Regime.IMBALANCED),
        (0.1, 3.0, Regime.IMBALANCED),
        (1.2, 0.8, Regime.OVERLOADED),
        (2.0, 2.0, Regime.OVERLOADED),
    ],
)
def test_regimes(prefill: float, decode: float, regime: Regime) -> None:
    assert Loads(prefill, decode, 2, 2).regime is regime


def test_one_more_worker_takes_its_share_of_the_load() -> None:
    after = Loads(2.0, 0.5, 2, 4).after(Role.PREFILL)
    assert (after.prefill, after.num_prefill, after.num_decode) == (2.0 * 2 / 3, 3, 3)
    assert after.decode == pytest.approx(0.5 * 4 / 3)


def test_more_workers_are_wanted_when_both_sides_are_full() -> None:
    story = make("p0", "d0")
    assert story.controller.status().wanted_workers == 2
    story.controller.roles.loads = Loads(2.0, 1.6, 2, 2)
    assert story.controller.roles.wanted_workers() >= 9


@pytest.mark.parametrize("num_looks", [0, 1])
def test_prompts_that_take_long_to_arrive_count_on_the_side_that_pulls(num_looks: int) -> None:
    story = make("p0", "p1", "p2", "d0")
    names: list[str] = []
    for second in range(12):
        names.append(str(second))
        story.submit(names[-1], LONG)
        ((prefill, decode),) = story.pairs()
        story.offered(prefill, names[-1])
        if len(names) > num_looks:
            story.tokens(decode, names.pop(0), 1, is_last=True)
        story.pass_time(1000, "roles")
    assert (roles(story).count("d") > 1) is (num_looks > 0)


def test_what_begins_to_arrive_has_been_on_its_way_no_longer_than_since_then() -> None:
    story = make("p0", "d0")
    story.submit("r0", LONG)
    ((prefill, _),) = story.pairs()
    story.offered(prefill, "r0")
    late = []
    for _ in range(3):
        story.pass_time(1000, "roles")
        late.append(story.controller.roles.loads.decode)
    # Seconds, over the TTFT of half a second.
    assert late == pytest.approx([2, 4, 6], rel=1e-3)


@pytest.mark.parametrize(("num_seats", "num_decodes"), [(200, 80), (20, 8)])
def test_few_vary_more_than_many(num_seats: int, num_decodes: int) -> None:
    story = make("p0", "d0", "d1", max_num_seqs=num_seats)
    for number in range(num_decodes):
        story.submit(f"r{number}", 20, max_tokens=20_000)
        ((prefill, decode),) = story.pairs()
        story.offered(prefill, f"r{number}")
        story.tokens(decode, f"r{number}", 1)
    for second in range(6):
        story.submit(f"s{second}", 2 * LONG, max_tokens=2)
        story.pass_time(1000, "roles")
    assert story.controller.roles.loads.prefill > 1
    assert (roles(story).count("p") > 1) is (num_decodes > 8)


def test_a_side_full_of_answers_that_turn_out_longer_gives_nobody() -> None:
    story = make("p0")
    story.num_blocks = 1 << 15  # 524,288 tokens
    for name in ("d0", "d1"):
        story.join(name, max_num_seqs=1024)
    for number in range(8):
        story.submit(f"r{number}", 20, max_tokens=100_000)
        ((_, decode),) = story.pairs()
        story.tokens(decode, f"r{number}", 1)
    for name, record in list(story.controller.requests.items()):
        story.grow(record.decode.info.worker_id, name, 80_000)
    press(story, 6, 15)
    assert story.controller.roles.loads.prefill > 1
    assert roles(story) == "pdd"


def test_those_that_stay_do_not_share_a_link() -> None:
    story = make("p0")
    for number in range(4):
        story.join(f"d{number}", max_num_seqs=1024, host=str(number // 2))
    while roles(story).count("p") < 3:
        press(story, 1, 15)
    staying = [w.info.host for w in story.controller.workers.values() if w.role is Role.DECODE]
    assert sorted(staying) == ["0", "1"]
