"""Figures of a run, from requests whose times are given."""

import pytest

from penstock.core.request import Timeline
from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.observe import Observation, Sample, Served, WorkerSample
from penstock.sim.summary import Slo, mean_parts, spread, summarise


def served(arrived_ms: int, ttft_ms: int, tpot_ms: int, num_tokens: int = 11) -> Served:
    first_ms = arrived_ms + ttft_ms
    return Served(
        arrived_ns=arrived_ms * NS_PER_MS,
        input_tokens=100,
        output_tokens=num_tokens,
        first_token_ns=first_ms * NS_PER_MS,
        finished_ns=(first_ms + tpot_ms * (num_tokens - 1)) * NS_PER_MS,
        num_tokens=num_tokens,
    )


def seen(*requests: Served) -> Observation:
    def sample(at_s: int, busy_s: int, role: str) -> Sample:
        worker = WorkerSample(busy_s * NS_PER_S, 0, 0, 0, 0.0)
        return Sample(at_s * NS_PER_S, 0, 0, {"w": role}, {"w": worker})

    observation = Observation(served=list(requests), ended_ns=10 * NS_PER_S)
    for one in (sample(0, 0, "prefill"), sample(4, 2, "decode"), sample(10, 8, "decode")):
        observation.note(one)
    return observation


def test_goodput_counts_who_met_both_limits_per_second_of_arrivals() -> None:
    failed = Served(5000 * NS_PER_MS, 100, 10, error="no")
    summary = summarise(
        seen(served(0, 100, 10), served(1000, 900, 10), served(2000, 100, 99), failed),
        Slo(ttft_ms=500, tpot_ms=20),
    )
    assert summary.goodput_per_s == pytest.approx(1 / 5)
    assert (summary.slo_attainment, summary.ttft_met, summary.tpot_met) == (0.25, 0.5, 0.5)
    assert (summary.finished, summary.failed) == (3, 1)
    assert summary.ttft_ms.p50 == pytest.approx(100)
    assert summary.tpot_ms.max == pytest.approx(99)


def test_use_is_counted_for_the_role_that_a_worker_had_then() -> None:
    summary = summarise(seen(served(0, 1, 1)), Slo())
    assert summary.utilisation == {"decode": 1.0, "prefill": 0.5}
    assert summary.flips == 1
    assert summary.utilisation_by_worker == {"w": 0.8}


def test_the_parts_of_ttft_add_up_to_it() -> None:
    one = served(0, 100, 1)
    stamps = {
        "prefill_started_ns": 10,
        "offered_ns": 60,
        "offer_received_ns": 62,
        "reserved_ns": 70,
        "pulled_ns": 80,
        "first_token_ns": 95,
    }
    one.timeline = Timeline(**{name: ms * NS_PER_MS for name, ms in stamps.items()})
    parts = mean_parts([one])
    assert sum(parts.values()) == pytest.approx(100)
    assert (parts["prefill"], parts["pull"]) == (50, 10)


def test_nothing_has_figures_too() -> None:
    assert spread([]).p99 == 0.0
    empty = Observation(samples=[Sample(0, 0, 0, {}, {})])
    assert summarise(empty, Slo()).slo_attainment == 0.0
