"""The figures of simulated runs as tables that fit a terminal of a hundred columns."""

from collections.abc import Callable

from penstock.sim.summary import Slo, Spread, Summary
from penstock.sim.sweep import Sweep, Tried, best_at_scale


def print_summary(title: str, summary: Summary, slo: Slo, took_s: float) -> None:
    """Print one run."""
    print(title)
    print(
        f"{summary.requests:,} requests in {summary.arrivals_s:,.0f} s, all over after "
        f"{summary.duration_s:,.0f} s"
    )
    print(
        f"simulated in {took_s:.1f} s: {summary.events / took_s:,.0f} events, "
        f"{summary.steps / took_s:,.0f} steps per second"
    )
    print(f"\n{'ms':<6}" + "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p99", "max")))
    for name, spread in _spreads(summary):
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
        print(f"{name:<6}" + "".join(f"{value:>11,.1f}" for value in values))
    print()
    for name, text in _figures(summary, slo):
        print(f"{name:<22}{text}")


def _spreads(summary: Summary) -> tuple[tuple[str, Spread], ...]:
    return (("TTFT", summary.ttft_ms), ("TPOT", summary.tpot_ms), ("E2E", summary.e2e_ms))


def _figures(summary: Summary, slo: Slo) -> list[tuple[str, str]]:
    use = ", ".join(f"{role} {share:.0%}" for role, share in summary.utilisation.items())
    parts = ", ".join(f"{n} {v:,.1f}" for n, v in summary.ttft_parts.items() if v >= 0.05)
    return [
        (
            "goodput",
            f"{summary.goodput_per_s:.3f} requests/s ({summary.slo_attainment:.1%} within TTFT "
            f"{slo.ttft_ms:g} ms and TPOT {slo.tpot_ms:g} ms; {summary.ttft_met:.1%} and "
            f"{summary.tpot_met:.1%} alone)",
        ),
        (
            "throughput",
            f"{summary.requests_per_s:.2f} requests/s; tokens/s: "
            f"{summary.input_tokens_per_s:,.0f} in, {summary.output_tokens_per_s:,.0f} out",
        ),
        ("busy", use),
        ("mean TTFT, ms", parts),
        (
            "transfer",
            f"{summary.gigabytes_moved:,.1f} GB; {summary.transfer_share:.2%} of TTFT, the copy "
            f"{summary.pull_share_of_e2e:.2%} of the whole request",
        ),
        ("prefix hits", f"{summary.prefix_hit_share:.1%} of prompt tokens"),
        ("role changes", f"{summary.flips}"),
        (
            "workers",
            f"{summary.workers_mean:.1f} in the mean; {summary.workers_started} started, "
            f"{summary.workers_retired} retired",
        ),
        ("preemptions", f"{summary.preemptions}"),
        ("failed, unfinished", f"{summary.failed}, {summary.unfinished}"),
    ]


def print_splits(tried: list[Tried], scales: tuple[float, ...], slo: Slo) -> None:
    """Print the splits that were tried, best first, and the best for other limits."""
    print(f"limits: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms; best split first\n")
    _print_tried(tried)
    print("\nwith limits so many times as long, the best is")
    for i, scale in enumerate(scales):
        best = best_at_scale(tried, i)
        print(f"  {scale:>5g}x  {best.cluster:<44} {best.attainment_at[i]:>7.1%} within")


def print_fewest(
    search: Sweep, fewest: int | None, at_scale: dict[float, int | None], target: float
) -> None:
    """Print every size that was tried with its best split, the answer, and that of other limits."""
    sizes = sorted(search.sizes.items())
    _print_tried([tried[0] for _, tried in sizes])
    if fewest is None:
        print(f"\nno size tried has {target:.0%} of requests within the limits")
    else:
        best = search.sizes[fewest][0]
        print(f"\nfewest: {fewest} workers, {best.gpus} GPUs: {best.cluster}")
    print("\nwith limits so many times as long, the fewest is")
    for i, (scale, count) in enumerate(at_scale.items()):
        if count is None:
            print(f"  {scale:>5g}x  more than {sizes[-1][0]} workers")
            continue
        best = best_at_scale(search.sizes[count], i)
        share = f"{best.attainment_at[i]:.1%} within"
        print(f"  {scale:>5g}x  {best.gpus:>4} GPUs: {best.cluster:<44} {share:>14}")


def _print_tried(tried: list[Tried]) -> None:
    names = ("within", "goodput/s", "TTFT p50", "p99", "TPOT p50", "p99")
    width = max([42, *(len(one.cluster) for one in tried)]) + 2
    print(f"{'cluster':<{width}}" + "".join(f"{name:>10}" for name in names))
    for one in tried:
        s = one.summary
        print(
            f"{one.cluster:<{width}}{s.slo_attainment:>10.1%}{s.goodput_per_s:>10.3f}"
            f"{s.ttft_ms.p50:>10,.0f}{s.ttft_ms.p99:>10,.0f}{s.tpot_ms.p50:>10,.1f}"
            f"{s.tpot_ms.p99:>10,.1f}"
        )


def print_columns(runs: dict[str, Summary]) -> None:
    """Print several runs beside each other."""
    print(f"{'':<18}" + "".join(f"{name:>12}" for name in runs))
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("TTFT p50, ms", lambda s: f"{s.ttft_ms.p50:,.1f}"),
        ("TTFT p99, ms", lambda s: f"{s.ttft_ms.p99:,.1f}"),
        ("TPOT p50, ms", lambda s: f"{s.tpot_ms.p50:,.2f}"),
        ("TPOT p99, ms", lambda s: f"{s.tpot_ms.p99:,.2f}"),
        ("E2E p50, ms", lambda s: f"{s.e2e_ms.p50:,.0f}"),
        ("within limits", lambda s: f"{s.slo_attainment:.1%}"),
        ("goodput/s", lambda s: f"{s.goodput_per_s:.2f}"),
    ]
    for name, value in rows:
        print(f"{name:<18}" + "".join(f"{value(summary):>12}" for summary in runs.values()))
