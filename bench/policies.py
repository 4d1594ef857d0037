"""Goodput under SLO of every policy, with and without changing roles, beside the best static split.

    python bench/policies.py                                   the loads that need no file
    python bench/policies.py --mooncake F --azure F --servegen F     and recorded ones
    python bench/policies.py --only phases --seeds 3 --add     one load, beside kept results
    python bench/policies.py --only phases --switching --add   only what changes roles, anew
    python bench/policies.py --quick                           two short loads

Simulated: the controller and workers that serve, over kernel times of H100, L20 and H20 and shared
links, so the figures are those of the code and do not depend on this machine. Every scenario is
run with the best static split that a sweep finds for it (with our own routing), with half of the
workers on either side, and from that half with roles that may change. All policies run on the same
cores, and our own routing without role changes is one of those that do not change: it computes
prompts on decode workers where that pays, so a split is less rigid under it than elsewhere. Loads
are parts of what the cluster could do at best by its step times, or rates.

In the rows, `best` stands for the best static split, found in hindsight, `half` for an even one,
`switch` for an even one whose roles may change. `phases` turns from long prompts with short answers
to short prompts with long answers and back; its rate is what the right split of each turn carries.
`bound` is what the right split of every turn alone would do with nobody left over from the turn
before, which no policy can reach. With `--seeds` every figure is one of each seed, and a ratio one
of two figures of the same seed. With promises, requests are refused that would come too late,
which the classic policies may use as well. `day` is a day of an R1-like service in five minutes:
every twelfth request of an hour into which it was squeezed, twelve times as fast; `day_busy` is the
same at more than twice the rate, where an even split is wrong.

What is asked of us, said with each figure as held or missed: where the ratio of prompts to answers
swings so that no split is right for long, 1.3 times the best that does not change roles, and it is
said for the even split, which a person would have, and for the one found in hindsight; elsewhere
0.98 of the best static split; in overload 0.9 of the peak.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

from report import Report

from penstock.control.policies import POLICIES
from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import Member, describe_fleet, parse_fleet, pools_of
from penstock.sim.observe import Observation
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, Summary, summarise
from penstock.sim.sweep import Sweep, Tried
from penstock.sim.workload import Arrival

OURS = "predicted"
SWITCH = "switch."
SWITCHED = ("least_loaded", "arrow")
"""Run with roles that change and with the best split, too, besides ours."""
SWING_TARGET, STATIC_TARGET, PEAK_TARGET = 1.3, 0.98, 0.9
BATCH = 64
"""Sequences in a decode step when we ask what a cluster could do at best."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A cluster under a load for so long; `load` 1 is what it could do at best, a `rate` is what it
    is. Of a recorded load every `thinned`th request is taken, so many times as fast.

    `turns` are sources, each alone with the rate and time of one phase.
    """

    name: str
    cluster: str
    source: str
    load: float = 1.0
    rate: float | None = None
    duration_s: float
    slo: Slo
    model: str = "llama3.1-70b"
    thinned: int = 1
    turns: tuple[tuple[str, float, float], ...] = ()
    has_promises: bool = False
    is_overload: bool = False
    is_swinging: bool = False


STEADY = "lognormal:in=2000,out=300"
CHAT_SLO = Slo(ttft_ms=2000, tpot_ms=40)
LONG_SLO = Slo(ttft_ms=10_000, tpot_ms=50)


PHASE_S, BUSIER, PHASES_RATE = 90.0, 1.8, 20.25


def phases() -> dict[str, object]:
    """Return the load whose ratio swings between two kinds of requests."""
    first = 2 * PHASES_RATE / (1 + BUSIER)
    kinds = (("lognormal:in=6000,out=120", first), ("lognormal:in=600,out=1500", first * BUSIER))
    return {
        "source": f"phases:phase={PHASE_S:g},busier={BUSIER:g}",
        "rate": PHASES_RATE,
        "duration_s": 3 * PHASE_S,
        "turns": tuple((f"{kind},sigma=0.5", rate, PHASE_S) for kind, rate in kinds),
        "is_swinging": True,
    }


def scenarios(options: argparse.Namespace) -> Iterator[Scenario]:
    """Yield what is asked for."""
    eight, mixed = "8xH100-tp4", "4xL20,4xH20"
    length_s = 40.0 if options.quick else 100.0
    small = {"model": "llama3.1-8b", "slo": Slo(ttft_ms=2000, tpot_ms=40)}

    def make(name: str, cluster: str, source: str = "", **other: object) -> Scenario:
        settings = {"duration_s": length_s, "slo": CHAT_SLO, "source": source, **other}
        return Scenario(name=name, cluster=cluster, **settings)

    flood = {"duration_s": 10.0 if options.quick else 30.0, "is_overload": True}
    yield make("overload", eight, STEADY, load=2.0, has_promises=True, **flood)
    if options.quick:
        yield make("swing", eight, f"swing:period={length_s / 2:g}", load=0.7)
        return
    yield make("phases", eight, **phases())
    yield make("phases_promised", eight, has_promises=True, **phases())
    yield make("steady", eight, STEADY, load=0.7)
    yield make("step", eight, "step:in=2000,out=300,at=50,factor=2", load=0.4)
    yield make("swing", eight, "swing:period=100", load=0.7, duration_s=200.0)
    yield make("steady_l20_h20", mixed, STEADY, load=0.7, **small)
    if options.azure:
        yield make("azure_conv", eight, options.azure, load=0.7)
    if options.servegen:
        day = {"duration_s": 300.0, "thinned": 12}
        yield make("day", eight, options.servegen, load=0.5, **day)
        yield make("day_busy", eight, options.servegen, load=1.2, **day)
    if options.mooncake:
        yield make("mooncake_8", eight, options.mooncake, load=0.6, slo=LONG_SLO)
        wide = {"slo": LONG_SLO, "duration_s": 40.0}
        yield make("mooncake_64", "64xH100-tp4", options.mooncake, load=0.6, **wide)


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

    def __init__(self, scenario: Scenario, load: float, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.pools = pools_of(parse_fleet(scenario.cluster, scenario.model))
        members = parse_fleet(scenario.cluster, scenario.model)
        rate = scenario.rate
        if rate is None:
            # What a mean request takes is the same at any rate.
            probe = make_workload(self._asked(rate=1.0, duration_s=scenario.duration_s))
            rate = load * best_rate(members, probe)
        step = scenario.thinned
        self.arrivals = make_workload(self._asked(rate * step, scenario.duration_s))[::step]
        self.rate = len(self.arrivals) / (self.arrivals[-1].at_ns / NS_PER_S)

    def _asked(self, rate: float, duration_s: float) -> WorkloadSpec:
        source = self.scenario.source
        return WorkloadSpec(source=source, rate=rate, duration_s=duration_s, seed=self.seed)

    def run(
        self, members: tuple[Member, ...], policy: str, *, is_switching: bool = False
    ) -> Observation:
        """Simulate one cluster under the scenario's load."""
        slo, promises = self.scenario.slo, self.scenario.has_promises
        controller = ControllerConfig(
            policy=policy,
            slo_ttft_ms=slo.ttft_ms if promises else None,
            slo_tpot_ms=slo.tpot_ms if promises else None,
            usual_ttft_ms=slo.ttft_ms,
            usual_tpot_ms=slo.tpot_ms,
            is_switching_roles=is_switching,
            max_queued=100_000,
        )
        # Long enough for the longest answer at the TPOT that is asked for.
        longest = max(arrival.output_tokens for arrival in self.arrivals)
        limit_s = self.arrivals[-1].at_ns / NS_PER_S + 60 + slo.ttft_ms / 100
        limit_s += longest * slo.tpot_ms / 1000
        spec = ServeSpec(members=members, controller=controller, sample_ns=5 * NS_PER_S)
        return ModelledCluster(spec, self.arrivals).run(limit_s=limit_s)

    def sweep(self) -> list[Tried]:
        """Run all static splits with our routing; return them, best first."""
        return Sweep(lambda members: self.run(members, OURS), self.scenario.slo).best_split(
            self.pools
        )

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


def run_scenario(report: Report, scenario: Scenario, options: argparse.Namespace) -> None:
    """Measure one scenario; its figures are named after it."""
    by_seed: dict[str, dict[str, float]] = report.extras.setdefault("by_seed", {})
    for seed in map(str, range(1, options.seeds + 1)):
        began_s = time.monotonic()
        kept = by_seed.get(f"{scenario.name}.{seed}", {}) if options.switching else {}
        goodputs = {k: v for k, v in kept.items() if not k.startswith(SWITCH)}
        goodputs |= measure(scenario, int(seed), options, is_static=not goodputs)
        by_seed[f"{scenario.name}.{seed}"] = goodputs
        print(f"  ({time.monotonic() - began_s:.0f} s)", flush=True)
        report.keep(options.output)
    runs = [by_seed[f"{scenario.name}.{seed}"] for seed in range(1, options.seeds + 1)]
    for name in runs[0]:
        report.add(f"{scenario.name}.{name}", [run[name] for run in runs if name in run], "good/s")
    compare(report, scenario, runs)


def measure(
    scenario: Scenario, seed: int, options: argparse.Namespace, *, is_static: bool
) -> dict[str, float]:
    """Return the goodput of every way to serve one scenario; of those that change roles alone if
    not `is_static`.
    """
    bench = Bench(scenario, scenario.load, seed)
    print(
        f"\n{scenario.name}: {scenario.cluster}, {bench.rate:.2f} requests/s, seed {seed}, TTFT "
        f"{scenario.slo.ttft_ms:g} ms, TPOT {scenario.slo.tpot_ms:g} ms"
    )
    half = half_split(scenario)
    goodputs: dict[str, float] = {}

    def add(name: str, summary: Summary) -> None:
        goodputs[name] = summary.goodput_per_s
        print(
            f"  {name:<24} {summary.goodput_per_s:>10.4g} good/s, {summary.slo_attainment:.1%} "
            f"within; TTFT p99 {summary.ttft_ms.p99:,.0f}, TPOT p99 {summary.tpot_ms.p99:,.1f} ms, "
            f"{summary.flips} role changes",
            flush=True,
        )

    def switch(policy: str) -> None:
        add(f"{SWITCH}{policy}", bench.figures(half, policy, is_switching=True))

    switch(OURS)
    if is_static:
        tried = bench.sweep()
        best = parse_fleet(tried[0].cluster, scenario.model)
        print(f"  best static split: {describe_fleet(best)}")
        add(f"best.{OURS}", tried[0].summary)
    for policy in options.policies:
        if is_static:
            add(f"half.{policy}", bench.figures(half, policy))
        if policy in SWITCHED:
            switch(policy)
            if is_static:
                add(f"best.{policy}", bench.figures(best, policy))
    if scenario.is_overload:
        loads = [Bench(scenario, load, seed) for load in (0.8, 1.1)]
        peaks = [one.figures(half, OURS, is_switching=True) for one in loads]
        goodputs[f"{SWITCH}peak"] = max(peak.goodput_per_s for peak in peaks)
    if scenario.turns and is_static and seed == 1:
        goodputs["bound"] = bound_of(scenario, seed)
    return goodputs


def compare(report: Report, scenario: Scenario, runs: list[dict[str, float]]) -> None:
    """Note how ours with changing roles stands to what does not change them, seed by seed."""

    def most(begin: str, but: str = " ") -> list[float]:
        return [
            max(v for k, v in run.items() if k.startswith(begin) and but not in k) for run in runs
        ]

    def add(name: str, over: list[float], under: list[float], target: float | None = None) -> None:
        ratios = [a / max(b, 1e-9) for a, b in zip(over, under, strict=True)]
        note = ""
        if target is not None:
            verdict = "held" if median(ratios) >= target else "missed"
            note = f"{verdict}: {target:g} is asked for"
        report.add(f"{scenario.name}.{name}", ratios, "x", note=note)

    ours, half = most(SWITCH + OURS), most("half.")
    static = [max(pair) for pair in zip(most("best."), half, strict=True)]
    target = SWING_TARGET if scenario.is_swinging else STATIC_TARGET
    add("ours_to_classic_half", ours, most("half.", OURS))
    add("ours_to_best_half", ours, half, target if scenario.is_swinging else None)
    add("ours_to_best_static", ours, static, target)
    if scenario.turns:
        add("bound_to_best_static", [runs[0]["bound"]], static[:1])
    if scenario.is_overload:
        add("goodput_to_peak", ours, most(SWITCH), PEAK_TARGET)


def bound_of(scenario: Scenario, seed: int) -> float:
    """Return the goodput of the best split of each turn alone, over all phases of the scenario."""
    num_phases = round(scenario.duration_s / PHASE_S)
    good = 0.0
    for index in range(num_phases):
        if index < len(scenario.turns):
            source, rate, phase_s = scenario.turns[index]
            alone = replace(scenario, source=source, rate=rate, duration_s=phase_s, turns=())
            best = Bench(alone, 1.0, seed).sweep()[0].summary
            turns = len(range(index, num_phases, len(scenario.turns)))
            good += turns * best.goodput_per_s * phase_s
    return good / scenario.duration_s


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short loads, within 45 s")
    for name in ("mooncake", "azure", "servegen"):
        parser.add_argument(f"--{name}", metavar="FILE", help="a recorded load (see data sources)")
    parser.add_argument("--only", metavar="NAME", help="one scenario")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many, from 1 on")
    parser.add_argument("--switching", action="store_true", help="keep what changes no roles")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, help="beside ours")
    parser.add_argument("--add", action="store_true", help="to the results that are kept already")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    usual = ["least_loaded"] if options.quick else [name for name in POLICIES if name != OURS]
    options.policies = [OURS, *(options.policies or usual)]
    report = Report("policies", settings={"policies": ", ".join(options.policies)})
    if options.add:
        report.resume(options.output)
    asked = [one for one in scenarios(options) if options.only in (None, one.name)]
    if not asked:
        parser.error(f"--only {options.only}: no such load, or it needs its recorded FILE")
    for scenario in asked:
        run_scenario(report, scenario, options)
        report.keep(options.output)
    report.finish(options.output)


if __name__ == "__main__":
    main()
