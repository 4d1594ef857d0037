"""The classic rules do what their names say, on open workers."""

from collections import Counter

import pytest

from penstock.control.policies import POLICIES
from penstock.control.router import Router
from penstock.core.config import ControllerConfig
from penstock.core.errors import StartupFailed
from tests.control.story import Story


def run(policy: str, *names: str, count: int = 12, num_prompt: int = 100) -> list[tuple[str, str]]:
    story = Story(*names, num_blocks=4096, policy=policy)
    for number in range(count):
        story.submit(f"r{number}", num_prompt)
    return story.pairs()


def test_round_robin_takes_turns() -> None:
    pairs = run("round_robin", "p0", "p1", "d0", "d1", "d2", count=6)
    assert pairs == [
        ("p0", "d0"),
        ("p1", "d1"),
        ("p0", "d2"),
        ("p1", "d0"),
        ("p0", "d1"),
        ("p1", "d2"),
    ]
    assert run("round_robin", "m0", "m1", count=4) == [(m, m) for m in ("m0", "m1") * 2]


def test_least_loaded_evens_out_and_a_tie_goes_to_who_came_first() -> None:
    pairs = run("least_loaded", "p0", "p1", "d0", "d1", count=5)
    assert pairs == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1"), ("p0", "d0")]


def test_power_of_two_draws_and_balances() -> None:
    names = [f"p{i}" for i in range(8)] + [f"d{i}" for i in range(8)]
    pairs = run("power_of_two", *names, count=400)
    assert pairs == run("power_of_two", *names, count=400)
    for side in zip(*pairs, strict=True):
        counts = Counter(side)
        assert len(counts) == 8
        assert max(counts.values()) - min(counts.values()) <= 12, counts


def test_prefix_aware_goes_to_the_prefix_unless_that_is_far_too_busy() -> None:
    story = Story("p0", "p1", "d0", num_blocks=4096, policy="prefix_aware")
    story.has_blocks("p1", 480)
    for number in range(20):
        story.submit(f"r{number}", 500)
    prefills = [prefill for prefill, _ in story.pairs()]
    assert set(prefills[:8]) == {"p1"}
    assert "p0" in prefills


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves_every_kind_of_cluster(policy: str) -> None:
    for names in (("p0", "d0"), ("m0",), ("p0",), ("d0", "m0"), ("p0", "p1", "d0", "m0")):
        for num_prompt in (1, 2, 300):
            pairs = run(policy, *names, count=3, num_prompt=num_prompt)
            assert len(pairs) == 3, (names, num_prompt)
            if num_prompt == 1:
                assert all(prefill == decode for prefill, decode in pairs)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_leaves_out_who_is_leaving(policy: str) -> None:
    story = Story("p0", "p1", "d0", "d1", num_blocks=4096, policy=policy)
    for name in ("p0", "d1"):
        story.controller.workers[name].is_leaving = True
    story.controller.fleet.reopen()
    for number in range(4):
        story.submit(f"r{number}", 300)
    assert {worker for pair in story.pairs() for worker in pair} <= {"p1", "d0"}


def test_a_policy_that_there_is_not_is_refused_by_name() -> None:
    story = Story()
    with pytest.raises(StartupFailed, match="least_loaded"):
        Router(ControllerConfig(policy="best"), story.controller.fleet)
