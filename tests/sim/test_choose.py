"""Workloads by name: rules with numbers, and files at a rate of one's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_S
from penstock.sim.choose import KINDS, WorkloadSpec, make_workload


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cv", [1.0, 0.5])
def test_every_rule_gives_the_rate_in_order_and_again_with_the_same_seed(
    kind: str, cv: float
) -> None:
    kind = "phases:phase=10" if kind == "phases" else kind  # whole turns: the rate is their mean
    spec = WorkloadSpec(source=kind, rate=5.0, duration_s=100.0, cv=cv)
    assert make_workload(spec) != make_workload(replace(spec, cv=2.0))
    arrivals = make_workload(spec)
    times = [a.at_ns for a in arrivals]
    assert times == sorted(times)
    assert times[-1] < 100 * NS_PER_S
    assert len(arrivals) == pytest.approx(500, rel=0.2)
    assert arrivals == make_workload(spec)
    assert arrivals != make_workload(replace(spec, seed=1))


def test_numbers_of_a_rule_can_be_given() -> None:
    spec = WorkloadSpec(source="fixed:in=77,out=3", rate=5.0, duration_s=10.0)
    assert {(a.input_tokens, a.output_tokens) for a in make_workload(spec)} == {(77, 3)}


@pytest.mark.parametrize("source", ["fixed:on=7", "fixed:in=x", "nothing", "chat:turns"])
def test_what_is_not_understood_is_refused_with_what_there_is(source: str) -> None:
    with pytest.raises(BadRequest, match=r"in=|fixed"):
        make_workload(WorkloadSpec(source=source))


def test_a_file_s_times_are_squeezed_to_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    rows = "".join(f"{i},{100 + i},5\n" for i in range(11))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    spec = WorkloadSpec(source=str(path), rate=2.2)
    assert [a.at_ns for a in make_workload(spec)][-1] == pytest.approx(5 * NS_PER_S, rel=1e-6)
    half = WorkloadSpec(source=str(path), duration_s=5.0, requests_max=3)
    assert len(make_workload(half)) == 3


def test_a_table_of_lengths_is_gone_through_again_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n10,1\n20,2\n")
    with pytest.raises(BadRequest, match="--rate"):
        make_workload(WorkloadSpec(source=str(path)))
    spec = WorkloadSpec(source=str(path), rate=1.0, duration_s=60.0)
    arrivals = make_workload(spec)
    assert len(arrivals) > 20
    assert len({a.pieces for a in arrivals}) == len(arrivals)


def test_nothing_is_not_a_workload() -> None:
    with pytest.raises(BadRequest, match="no requests"):
        make_workload(WorkloadSpec(source="fixed", rate=0.001, duration_s=0.1))
