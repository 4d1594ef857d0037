"""Goodput under SLO of every policy, with and without changing roles, beside the best static split.

    python bench/policies.py                                   the loads that need no file
    python bench/policies.py --mooncake F --azure F --servegen F     and recorded ones
    python bench/policies.py --quick                           two short loads, within 45 s

Simulated: the controller and workers that serve, over kernel times of H100, L20 and H20 and shared
links, so the figures are those of the code and do not depend on this machine. Every scenario is
run with the best static split that a sweep finds for it (with our own routing), with half of the
workers on either side, and from that half with roles that may change; no other policy is said to
have more than it has: all of them run on the same cores. Loads are parts of what the cluster could
do at best by its step times.

In the rows, `best` stands for the best static split, `half` for an even one, `switch` for an even
one whose roles may change. Overload is run with promises (requests are refused that would come too
late), which the classic policies may use as well.

What is asked of us, said with each figure as held or missed: where the ratio of prompts to answers
swings so that no split is right for long, 1.3 times the best that does not change roles; elsewhere
0.98 of the best static split; in overload 0.9 of the peak.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

from report import Report

from penstock.control.policies import POLICIES
from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import Member, describe_fleet, parse_fleet, pools_of
from penstock.sim.observe import Observation
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, Summary, summarise
from penstock.sim.sweep import Sweep
from penstock.sim.workload import Arrival

OURS = "predicted"
SWING_TARGET, STATIC_TARGET, PEAK_TARGET = 1.3, 0.98, 0.9
BATCH = 64
"""Sequences in a decode step when we ask what a cluster could do at best."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A cluster under a load for so long; `load` 1 is what it could do at best."""

    name: str
    cluster: str
    source: str
    load: float
    duration_s: float
    slo: Slo
    model: str = "llama3.1-70b"
    is_overload: bool = False


CHAT_SLO = Slo(ttft_ms=2000, tpot_ms=40)
LONG_SLO = Slo(ttft_ms=10_000, tpot_ms=50)


def scenarios(options: argparse.Namespace) -> Iterator[Scenario]:
    """Yield what is asked for."""
    eight, mixed = "8xH100-tp4", "4xL20,4xH20"
    length_s = 40.0 if options.quick else 300.0
    flood_s = 10.0 if options.quick else 60.0
    small = {"model": "llama3.1-8b", "slo": Slo(ttft_ms=2000, tpot_ms=40)}

    def make(name: str, cluster: str, source: str, load: float, **other: object) -> Scenario:
        settings = {"duration_s": length_s, "slo": CHAT_SLO, **other}
        return Scenario(name=name, cluster=cluster, source=source, load=load, **settings)

    yield make("swing", eight, f"swing:period={length_s / 2:g}", 0.7)
    if not options.quick:
        yield make("swing_busy", eight, "swing:period=150", 0.9)
    flood = {"duration_s": flood_s, "is_overload": True}
    yield make("overload", eight, "lognormal:in=2000,out=300", 2.0, **flood)
    if options.quick:
        return
    yield make("steady", eight, "lognormal:in=2000,out=300", 0.7)
    yield make("step", eight, "step:in=2000,out=300,at=100,factor=2", 0.4)
    yield make("steady_l20_h20", mixed, "lognormal:in=2000,out=300", 0.7, **small)
    yield make("swing_l20_h20", mixed, "swing:period=150", 0.6, **small)
    if options.servegen:
        yield make("r1_hour", eight, options.servegen, 0.6, duration_s=3600.0)
    if options.azure:
        yield make("azure_conv", eight, options.azure, 0.7)
    if options.mooncake:
        yield make("mooncake_8", eight, options.mooncake, 0.6, slo=LONG_SLO)
        yield make("mooncake_64", "64xH100-tp4", options.mooncake, 0.6, slo=LONG_SLO)


def best_rate(members: tuple[Member, ...], arrivals: list[Arrival]) -> float:
    """Return the requests per second that the workers could do if none ever waited for another.

    The seconds that a mean request takes: its prefill, and its share of decode steps of `BATCH`.
    """
    rate = 0.0
    for member in members:
        times = member.hardware.times
        milliseconds = 0.0
        for arrival in arrivals:
            size, output = arrival.input_tokens, arrival.output_tokens
            milliseconds += times.a + times.b * size + times.c * size * size
            per_token = times.d / BATCH + times.e + times.f * (size + output / 2)
            milliseconds += output * per_token
        rate += 1000 * len(arrivals) / milliseconds
    return rate


class Bench:
    """One scenario: its arrivals, and a run of each cluster and policy."""

    def __init__(self, scenario: Scenario, load: float) -> None:
        self.scenario = scenario
        self.pools = pools_of(parse_fleet(scenario.cluster, scenario.model))
        members = parse_fleet(scenario.cluster, scenario.model)
        # What a mean request takes is the same at any rate.
        probe = make_workload(self._asked(rate=1.0, duration_s=scenario.duration_s))
        rate = load * best_rate(members, probe)
        self.arrivals = make_workload(self._asked(rate, scenario.duration_s))
        self.rate = len(self.arrivals) / (self.arrivals[-1].at_ns / NS_PER_S)

    def _asked(self, rate: float, duration_s: float) -> WorkloadSpec:
        source = self.scenario.source
        return WorkloadSpec(source=source, rate=rate, duration_s=duration_s, seed=1)

    def run(
        self, members: tuple[Member, ...], policy: str, *, is_switching: bool = False
    ) -> Observation:
        """Simulate one cluster under the scenario's load."""
        slo, promises = self.scenario.slo, self.scenario.is_overload
        controller = ControllerConfig(
            policy=policy,
            slo_ttft_ms=slo.ttft_ms if promises else None,
            slo_tpot_ms=slo.tpot_ms if promises else None,
            usual_ttft_ms=slo.ttft_ms,
            usual_tpot_ms=slo.tpot_ms,
            is_switching_roles=is_switching,
            max_queued=100_000,
        )
        limit_s = self.arrivals[-1].at_ns / NS_PER_S + 60 + slo.ttft_ms / 100
        spec = ServeSpec(members=members, controller=controller, sample_ns=5 * NS_PER_S)
        return ModelledCluster(spec, self.arrivals).run(limit_s=limit_s)

    def figures(self, members: tuple[Member, ...], policy: str, **how: bool) -> Summary:
        """Return the figures of one run."""
        return summarise(self.run(members, policy, **how), self.scenario.slo)


def half_split(scenario: Scenario) -> tuple[Member, ...]:
    """Return half of the workers on either side; of two kinds, one kind on each."""
    items = []
    pools = pools_of(parse_fleet(scenario.cluster, scenario.model))
    for index, pool in enumerate(pools):
        gpu = f"{pool.hardware.gpu}-tp{pool.hardware.tp}"
        if len(pools) > 1:
            items.append(f"{pool.count}x{gpu}:{'decode' if index else 'prefill'}")
        else:
            items += [f"{pool.count // 2}x{gpu}:prefill", f"{-(-pool.count // 2)}x{gpu}:decode"]
    return parse_fleet(",".join(items), scenario.model)


def run_scenario(report: Report, scenario: Scenario, policies: list[str]) -> None:
    """Measure one scenario; its figures are named after it."""
    began_s = time.monotonic()
    bench = Bench(scenario, scenario.load)
    print(
        f"\n{scenario.name}: {scenario.cluster}, {bench.rate:.2f} requests/s (load "
        f"{scenario.load:g}), TTFT {scenario.slo.ttft_ms:g} ms, TPOT {scenario.slo.tpot_ms:g} ms"
    )
    tried = Sweep(lambda members: bench.run(members, OURS), scenario.slo).best_split(bench.pools)
    best = parse_fleet(tried[0].cluster, scenario.model)
    print(f"  best static split: {describe_fleet(best)}")
    half = half_split(scenario)
    goodputs: dict[str, float] = {}

    def add(name: str, summary: Summary) -> None:
        goodputs[name] = summary.goodput_per_s
        note = (
            f"{summary.slo_attainment:.1%} within; TTFT p99 {summary.ttft_ms.p99:,.0f}, TPOT p99 "
            f"{summary.tpot_ms.p99:,.1f} ms, {summary.flips} role changes"
        )
        report.add(f"{scenario.name}.{name}", [summary.goodput_per_s], "good/s", note=note)

    add("best.predicted", tried[0].summary)
    for policy in policies:
        if policy != OURS:
            add(f"best.{policy}", bench.figures(best, policy))
        add(f"half.{policy}", bench.figures(half, policy))
        add(f"switch.{policy}", bench.figures(half, policy, is_switching=True))
    compare(report, scenario, goodputs)
    print(f"  ({time.monotonic() - began_s:.0f} s)", flush=True)


def compare(report: Report, scenario: Scenario, goodputs: dict[str, float]) -> None:
    """Note how ours with changing roles stands to what does not change them."""
    ours = goodputs[f"switch.{OURS}"]
    half = max(value for name, value in goodputs.items() if name.startswith("half."))
    best = max(value for name, value in goodputs.items() if name.startswith("best."))
    target = SWING_TARGET if scenario.name.startswith("swing") else STATIC_TARGET
    report.add(f"{scenario.name}.ours_to_best_half", [ours / max(half, 1e-9)], "x")
    add_judged(report, f"{scenario.name}.ours_to_best_static", ours / max(best, half), target)
    if scenario.is_overload:
        peak = max(
            Bench(scenario, load)
            .figures(half_split(scenario), OURS, is_switching=True)
            .goodput_per_s
            for load in (0.8, 1.1)
        )
        add_judged(report, f"{scenario.name}.goodput_to_peak", ours / max(peak, ours), PEAK_TARGET)


def add_judged(report: Report, name: str, value: float, target: float) -> None:
    """Note a figure beside what is asked of it."""
    verdict = "held" if value >= target else "missed"
    report.add(name, [value], "x", note=f"{verdict}: {target:g} is asked for")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short loads, within 45 s")
    for name in ("mooncake", "azure", "servegen"):
        parser.add_argument(f"--{name}", metavar="FILE", help="a recorded load (see data sources)")
    parser.add_argument("--only", metavar="NAME", help="one scenario")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    policies = [OURS, "least_loaded"] if options.quick else list(POLICIES)
    report = Report("policies", settings={"policies": ", ".join(policies)})
    for scenario in scenarios(options):
        if options.only in (None, scenario.name):
            run_scenario(report, scenario, policies)
            report.keep(options.output)
    report.finish(options.output)


if __name__ == "__main__":
    main()
