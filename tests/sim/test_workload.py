"""Arrivals: prompts of pieces, sessions, and times drawn at a rate."""

import random
import statistics
from itertools import pairwise

import pytest

from penstock.core.types import NS_PER_S
from penstock.sim.modelled import TOKEN
from penstock.sim.workload import (
    Arrival,
    SessionShape,
    Turn,
    arrival_times,
    constant,
    lognormal,
    phased,
    sessions,
    step,
    swinging,
    synthetic,
)


def test_a_prompt_is_its_pieces_one_after_the_other() -> None:
    arrival = Arrival(0, ((7, 2), (9, 3)), 4)
    assert arrival.prompt() == (7, 7, 9, 9, 9)
    assert arrival.input_tokens == 5
    assert Arrival(0, ((7, 2),), 4).prompt() == (7, 7)


def test_a_turn_repeats_the_conversation_and_comes_after_the_answer() -> None:
    first = Arrival(5, ((7, 2),), 3, (Turn(10, 4, 6), Turn(20, 1, 1)))
    second = first.next_turn(100, name=50)
    assert second is not None
    assert second.prompt() == (7, 7, TOKEN, TOKEN, TOKEN, 50, 50, 50, 50)
    assert (second.at_ns, second.output_tokens) == (110, 6)
    third = second.next_turn(200, name=51)
    assert third is not None
    assert third.input_tokens == 9 + 6 + 1
    assert third.next_turn(300, name=52) is None


@pytest.mark.parametrize(("cv", "spread"), [(0.0, 0.0), (1.0, 1.0), (3.0, 3.0)])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv: float, spread: float) -> None:
    times = list(arrival_times(random.Random(1), constant(20.0), 2000.0, cv=cv))
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) == pytest.approx(40_000, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(spread, abs=0.1)


def test_a_step_changes_the_rate_once() -> None:
    times = list(arrival_times(random.Random(1), step(10.0, 100.0, 3.0), 200.0))
    before = sum(t < 100 for t in times)
    assert before == pytest.approx(1000, rel=0.1)
    assert len(times) - before == pytest.approx(3000, rel=0.1)


def test_single_requests_share_the_system_prompt_and_nothing_else() -> None:
    arrivals = list(
        synthetic(random.Random(0), lambda _: (10, 2), iter([0.5, 1.0]), shared_tokens=4)
    )
    first, second = (a.prompt() for a in arrivals)
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])
    assert [a.at_ns for a in arrivals] == [NS_PER_S // 2, NS_PER_S]


def test_sessions_have_as_many_turns_as_asked_for_in_the_mean() -> None:
    drawn = list(sessions(random.Random(0), SessionShape(turns=6), iter(range(5000))))
    assert statistics.mean(1 + len(a.turns) for a in drawn) == pytest.approx(6, rel=0.05)


def test_lognormal_lengths_have_the_mean_asked_for() -> None:
    rng = random.Random(0)
    drawn = [lognormal(rng, 1000, 0.8) for _ in range(20_000)]
    assert statistics.mean(drawn) == pytest.approx(1000, rel=0.03)


def test_the_ratio_of_input_to_output_swings() -> None:
    arrivals = list(swinging(random.Random(0), 20.0, 600.0, period_s=600.0))

    def ratio(from_s: float, to_s: float) -> float:
        inside = [a for a in arrivals if from_s <= a.at_ns / NS_PER_S < to_s]
        return sum(a.input_tokens for a in inside) / sum(a.output_tokens for a in inside)

    assert ratio(100, 200) > 10 * ratio(400, 500)


def test_phases_take_turns_and_the_second_is_busier() -> None:
    arrivals = list(phased(random.Random(0), 20.0, 400.0, phase_s=100.0, busier=3.0, cv=1.0))
    first = [a for a in arrivals if a.at_ns // (100 * NS_PER_S) % 2 == 0]
    second = [a for a in arrivals if a.at_ns // (100 * NS_PER_S) % 2 == 1]
    assert len(first) == pytest.approx(10 * 200, rel=0.1)
    assert len(second) == pytest.approx(30 * 200, rel=0.1)
    assert min(sum(a.input_tokens for a in first) / len(first), 6000) > 5000
    assert sum(a.output_tokens for a in second) / len(second) > 1000
