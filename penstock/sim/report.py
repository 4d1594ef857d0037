"""`render_report`: a simulated run as one HTML page that needs nothing beside itself.

Timelines of load, queues, roles and use, and distributions of what clients saw. It computes no
figure that `Summary` has; called by the command line.
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Final

import numpy as np

from penstock.core.types import NS_PER_S
from penstock.sim.chart import Axes, Cell, Series, line_chart, strips
from penstock.sim.observe import Observation, Sample
from penstock.sim.summary import PARTS, Slo, Spread, Summary

_CELLS_MAX: Final = 150
_STYLE: Final = """
:root { color-scheme: light dark; --fg: #1d2430; --dim: #667085; --grid: #e4e7ec; --bg: #fff;
  --prefill: #2f6fdb; --decode: #e07b21; --mixed: #2f9e62; --other: #8c4bc9; --mark: #c8324a; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ef; --dim: #98a2b3; --grid: #2b3240;
  --bg: #14181f; --prefill: #6ea1ff; --decode: #ffa657; --mixed: #56c98a; --other: #c295f0;
  --mark: #ff7b8f; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 1180px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 20px; margin: 0 0 4px; } p { color: var(--dim); margin: 0 0 16px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 20px; }
svg { width: 100%; height: auto; } table { border-collapse: collapse; margin: 0 24px 20px 0; }
td, th { padding: 2px 12px 2px 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; } th { color: var(--dim); font-weight: 500; }
.tables { display: flex; flex-wrap: wrap; }
text { font: 10px system-ui, sans-serif; fill: var(--dim); } .title { font-size: 12px;
  fill: var(--fg); font-weight: 600; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--grid); } .axis { stroke: var(--dim); } .mark { stroke: var(--mark);
  stroke-dasharray: 4 3; } .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.prefill { stroke: var(--prefill); } .decode { stroke: var(--decode); } .mixed {
  stroke: var(--mixed); } .other { stroke: var(--other); } rect.prefill { fill: var(--prefill);
  stroke: none; } rect.decode { fill: var(--decode); stroke: none; } rect.mixed {
  fill: var(--mixed); stroke: none; } rect.other { fill: var(--other); stroke: none; }
.area { stroke: none; } .area.prefill { fill: var(--prefill); } .area.decode {
  fill: var(--decode); } .area.mixed { fill: var(--mixed); }
"""


def render_report(title: str, seen: Observation, summary: Summary, slo: Slo) -> str:
    """Return the page."""
    charts = [
        _load(seen.samples),
        _latency_over_time(seen),
        _queues(seen.samples),
        _roles(seen.samples),
        _cdf(
            "Time to first token",
            [s.ttft_s * 1000 for s in seen.served if s.first_token_ns],
            "ms",
            slo.ttft_ms,
        ),
        _cdf(
            "Time per output token",
            [s.tpot_s * 1000 for s in seen.served if s.finished_ns and s.num_tokens > 1],
            "ms",
            slo.tpot_ms,
        ),
        _parts(summary),
        _workers(seen.samples),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{escape(_headline(summary, slo))}</p>"
        f'<div class="tables">{_latencies(summary)}{_figures(summary)}</div>'
        f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts)}</div></html>\n'
    )


def _headline(summary: Summary, slo: Slo) -> str:
    return (
        f"{summary.requests:,} requests in {summary.arrivals_s:,.0f} s; goodput "
        f"{summary.goodput_per_s:.2f} requests/s, {summary.slo_attainment:.1%} within "
        f"TTFT {slo.ttft_ms:g} ms and TPOT {slo.tpot_ms:g} ms"
    )


def _latencies(summary: Summary) -> str:
    def row(name: str, spread: Spread) -> str:
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
        return f"<tr><td>{name}</td>" + "".join(f"<td>{v:,.1f}</td>" for v in values) + "</tr>"

    head = "".join(f"<th>{name}</th>" for name in ("ms", "mean", "p50", "p90", "p99", "max"))
    rows = row("TTFT", summary.ttft_ms) + row("TPOT", summary.tpot_ms) + row("E2E", summary.e2e_ms)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _figures(summary: Summary) -> str:
    use = ", ".join(f"{role} {share:.0%}" for role, share in summary.utilisation.items())
    rows = [
        ("output tokens/s", f"{summary.output_tokens_per_s:,.0f}"),
        ("busy", use),
        ("prefix hits", f"{summary.prefix_hit_share:.1%}"),
        ("transfer of TTFT", f"{summary.transfer_share:.1%}"),
        ("role changes", f"{summary.flips}"),
        ("preemptions", f"{summary.preemptions}"),
        ("failed / unfinished", f"{summary.failed} / {summary.unfinished}"),
    ]
    return "<table>" + "".join(f"<tr><td>{n}</td><td>{v}</td></tr>" for n, v in rows) + "</table>"


def _load(samples: Sequence[Sample]) -> str:
    thinned = _thin(samples)
    xs = [b.at_ns / NS_PER_S for _, b in pairwise(thinned)]

    def rates(counts: list[int]) -> list[float]:
        spans = [(b.at_ns - a.at_ns) / NS_PER_S for a, b in pairwise(thinned)]
        return [(b - a) / span for (a, b), span in zip(pairwise(counts), spans, strict=True)]

    arrived = rates([s.num_arrived for s in thinned])
    ended = rates([s.num_ended for s in thinned])
    axes = Axes(title="Load", x_label="s", y_label="requests/s")
    return line_chart(
        axes, [Series("arrived", xs, arrived, "other"), Series("answered", xs, ended, "mixed")]
    )


def _queues(samples: Sequence[Sample]) -> str:
    thinned = _thin(samples)
    xs = [s.at_ns / NS_PER_S for s in thinned]
    waiting = [float(sum(w.waiting for w in s.workers.values())) for s in thinned]
    running = [float(sum(w.running for w in s.workers.values())) for s in thinned]
    under_way = [float(s.num_arrived - s.num_ended) for s in thinned]
    axes = Axes(title="Requests", x_label="s", y_label="requests")
    return line_chart(
        axes,
        [
            Series("under way", xs, under_way, "other"),
            Series("running", xs, running, "mixed"),
            Series("waiting", xs, waiting, "decode"),
        ],
    )


def _roles(samples: Sequence[Sample]) -> str:
    samples = [s for s in samples if s.roles]  # the first is before anybody has joined
    xs = [s.at_ns / NS_PER_S for s in samples]
    stacked, series = [0.0] * len(samples), []
    for role in sorted({role for s in samples for role in s.roles.values()}):
        counts = [list(s.roles.values()).count(role) for s in samples]
        stacked = [below + count for below, count in zip(stacked, counts, strict=True)]
        series.append(Series(role, xs, stacked, role, is_stepped=True, is_filled=True))
    # The highest first: each covers the lower part of the one before.
    return line_chart(Axes(title="Workers by role", x_label="s", y_label="workers"), series[::-1])


def _latency_over_time(seen: Observation) -> str:
    """Percentiles of TTFT by time of arrival."""
    served = [s for s in seen.served if s.first_token_ns]
    if not served:
        return ""
    arrived = np.array([s.arrived_ns / NS_PER_S for s in served])
    ttft_s = np.array([s.ttft_s for s in served])
    edges = np.linspace(0.0, float(arrived.max()) + 1e-9, min(60, max(len(served) // 20, 1)) + 1)
    bins = np.digitize(arrived, edges) - 1
    groups = [(float(edges[i + 1]), ttft_s[bins == i]) for i in range(len(edges) - 1)]
    filled = [(x, group) for x, group in groups if len(group)]
    xs = [x for x, _ in filled]
    return line_chart(
        Axes(title="TTFT by arrival", x_label="s", y_label="s"),
        [
            Series("p99", xs, [float(np.percentile(g, 99)) for _, g in filled], "decode"),
            Series("p50", xs, [float(np.percentile(g, 50)) for _, g in filled], "prefill"),
        ],
    )


def _cdf(title: str, values: Sequence[float], unit: str, limit: float) -> str:
    ordered = sorted(value for value in values if value > 0)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes = Axes(
        title=title,
        x_label=unit,
        y_label="share of requests",
        is_log_x=True,
        y_max=1.0,
        marks=((limit, f"limit {limit:g}"),),
    )
    return line_chart(axes, [Series("", ordered, shares, "prefill")])


def _parts(summary: Summary) -> str:
    """The mean TTFT as one strip of its parts."""
    css = dict(
        zip(PARTS, ("other", "prefill", "mixed", "other", "mixed", "decode", "other"), strict=True)
    )
    cells, begin = [], 0.0
    for name, milliseconds in summary.ttft_parts.items():
        if milliseconds > 0:
            hint = f"{name}: {milliseconds:.2f} ms"
            cells.append(Cell(begin, begin + milliseconds, css[name], 0.9, hint))
            begin += milliseconds
    legend = ", ".join(f"{n} {v:.1f}" for n, v in summary.ttft_parts.items() if v >= 0.05)
    return strips(
        Axes(title="Where the mean TTFT goes", x_label=f"ms: {legend}", y_label=""),
        [("TTFT", cells)],
    )


def _workers(samples: Sequence[Sample]) -> str:
    """One strip per worker: coloured by its role, as strong as it was busy."""
    thinned = _thin(samples)
    rows = []
    for name in thinned[-1].workers:
        cells = []
        for before, after in pairwise(thinned):
            if name not in before.workers or name not in after.workers:
                continue
            spent = after.workers[name].busy_ns - before.workers[name].busy_ns
            share = min(spent / max(after.at_ns - before.at_ns, 1), 1.0)
            role = after.roles.get(name, "")
            held = after.workers[name].held_share
            begin_s, end_s = before.at_ns / NS_PER_S, after.at_ns / NS_PER_S
            hint = f"{name} ({role or 'away'}) at {end_s:.0f} s: busy {share:.0%}, KV {held:.0%}"
            cells.append(Cell(begin_s, end_s, role or "other", share, hint))
        rows.append((name, cells))
    return strips(Axes(title="Workers: role and use", x_label="s", y_label=""), rows)


def _thin(samples: Sequence[Sample]) -> list[Sample]:
    stride = max(1, -(-len(samples) // _CELLS_MAX))
    kept = list(samples[::stride])
    return kept if kept[-1] is samples[-1] else [*kept, samples[-1]]
