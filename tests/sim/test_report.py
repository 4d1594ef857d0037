"""The page of a run: one file, all charts, and the figures of its summary."""

import re
from xml.etree import ElementTree

import pytest

from penstock.sim.chart import HEIGHT
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import parse_fleet
from penstock.sim.report import render_report
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, summarise


def test_a_page_needs_nothing_and_shows_everybody() -> None:
    members = parse_fleet("2xH100:prefill,H100:decode", "llama3.1-8b")
    arrivals = make_workload(WorkloadSpec(source="chat", rate=1.0, duration_s=20.0))
    seen = ModelledCluster(ServeSpec(members=members), arrivals).run(limit_s=500)
    summary = summarise(seen, Slo(ttft_ms=100))
    page = render_report("chat on <three>", seen, summary, Slo(ttft_ms=100))
    assert not re.search(r"https?://|<script|src=", page)
    assert "chat on &lt;three&gt;" in page
    assert f"{summary.ttft_ms.p99:,.1f}" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        ElementTree.fromstring(chart)
    for name in ("prefill-0", "prefill-1", "decode-0"):
        assert f">{name}</text>" in page
    assert 'class="line prefill"' in page
    # Workers by role are stacked: two prefill workers above one that decodes.
    tops = [
        float(re.search(r'd="M[\d.]+ ([\d.]+)[^"]*Z" class="area ' + role, page)[1])
        for role in ("prefill", "decode")
    ]
    base = HEIGHT - 40
    assert base - tops[0] == pytest.approx(3 * (base - tops[1]), abs=0.2)


def test_a_run_in_which_nothing_was_answered_has_a_page_too() -> None:
    members = parse_fleet("H100", "llama3.1-8b")
    arrivals = make_workload(WorkloadSpec(source="fixed:in=9000", rate=1.0, duration_s=5.0))
    seen = ModelledCluster(ServeSpec(members=members), arrivals).run(limit_s=0.1)
    assert "<svg" in render_report("nothing", seen, summarise(seen, Slo()), Slo())
