"""Experiments that FlowKV and KVDirect published, simulated in shape beside their figures.

    python bench/published.py            all, some minutes
    python bench/published.py --quick    a part of each, a few seconds
    python bench/published.py --only throughput|scenarios|mixed|kvdirect    beside kept results

FlowKV's throughput: Llama-3.1-8B on two A100, one for either part or both for both, prompts of
1K, 5K and 10K tokens, answers of 256, output tokens per second. Its three scenarios (normal,
imbalanced, overloaded), of which no figures are known: 2 + 2 workers that go round robin, that are
chosen by load, and that change roles or grow besides. Its heterogeneous cluster: four L20 and four
H20, lengths of three LongBench tasks: L20 prefill with H20 decode, the reverse, and all eight doing
both.

KVDirect's latency: Llama-3.1-70B on eight GPUs a worker, prompts of 8K to 32K, outputs of 128 and
512, rising rates: two workers doing both (co-located; as its baseline did, with each prompt in one
step, and with chunks), or one of either role with the KV pulled when it is computed, pushed into
blocks reserved before, or pulled while it is computed; and where a request's time goes. Same
hardware on all sides of every comparison.

What differs from the papers: GPUs of KVDirect are not published (H100 here); step times are sums
of kernel times; LongBench's answers are taken to be as long as its table allows. The figures do not
depend on this machine.
"""

import argparse
import gc
from statistics import mean

from report import Report

from penstock.core.config import ControllerConfig, Handoff
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import parse_fleet
from penstock.sim.observe import Observation
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, Summary, summarise

FLOWKV_TASKS = {
    "gov_report": ("lognormal:in=11790,out=512,sigma=0.4", 0.8, 34.67, 48.9),
    "multi_news": ("lognormal:in=2850,out=512,sigma=0.4", 2.0, 40.1, 29.4),
    "qmsum": ("lognormal:in=14330,out=512,sigma=0.4", 0.8, 8.8, 15.2),
}
"""Lengths (LongBench's means, 1.35 tokens a word), requests per second, and by how many percent
less E2E the paper has for P-L20/D-H20 than for the reverse and for co-located workers.

Source: FlowKV (arXiv 2504.03775), in a third party's summary.
"""
KVDIRECT_CLAIM = 55.0
"""Percent less latency per request than the baseline on the same hardware (arXiv 2501.14743)."""
CHAPTERS = ("throughput", "scenarios", "mixed", "kvdirect")
PARTS = ("queue", "prefill", "transfer", "decode_queue", "decode")
FLOWKV_RATES = {(1000, 2.0): None, (5000, 1.0): (264.22, 203.04), (10_000, 2.0): (285.14, None)}
"""Prompt tokens and requests per second, and output tokens per second of FlowKV and of vLLM
co-located, where they are known.
"""
SCENARIOS = {
    "normal": ("lognormal:in=1000,out=256", 6.0),
    "imbalanced": ("lognormal:in=8000,out=32", 3.6),
    "overloaded": ("lognormal:in=4000,out=256", 12.0),
}
"""Lengths and requests per second for 2 + 2 A100 with the 8B model."""
SCENARIO_SLO = Slo(ttft_ms=2000, tpot_ms=50)


def simulate(
    cluster: str, model: str, asked: WorkloadSpec, fabric: FabricCost, **settings: object
) -> Observation:
    """Return what was seen of one cluster under one load, all requests served to the end."""
    arrivals = make_workload(asked)
    controller = ControllerConfig(policy="least_loaded", max_queued=100_000)
    spec = ServeSpec(
        members=parse_fleet(cluster, model),
        fabric=fabric,
        sample_ns=5 * NS_PER_S,
        **{"controller": controller, **settings},
    )
    return ModelledCluster(spec, arrivals).run(limit_s=1e5)


def serve(
    cluster: str, model: str, asked: WorkloadSpec, fabric: FabricCost, **settings: object
) -> Summary:
    """Return the figures of that."""
    return summarise(simulate(cluster, model, asked, fabric, **settings), Slo())


def held_ms(seen: Observation) -> float:
    """Return how long, on the mean, blocks stood reserved before the request could use them."""
    lines = [served.timeline for served in seen.served if served.timeline is not None]
    return mean((line.pulled_ns - line.held_ns) / 1e6 for line in lines)


def parts_ms(summary: Summary) -> dict[str, float]:
    """Return where a mean request's time went, in the terms of KVDirect's breakdown."""
    parts = summary.ttft_parts
    after_first = summary.e2e_ms.mean - summary.ttft_ms.mean
    return {
        "queue": parts["queue"],
        "prefill": parts["prefill"],
        "transfer": parts["offer"] + parts["pull"],
        "decode_queue": parts["wait_for_room"],
        "decode": parts["first_decode"] + after_first,
    }


def flowkv(report: Report, tasks: list[str]) -> None:
    """Run the heterogeneous experiment."""
    fabric = FabricCost(card_bytes_per_s=10.8e9, latency_ns=1_900_000)  # as fitted to its tables
    clusters = {
        "l20_to_h20": "4xL20:prefill,4xH20:decode",
        "h20_to_l20": "4xH20:prefill,4xL20:decode",
        "colocated": "4xL20:mixed,4xH20:mixed",
    }
    for task in tasks:
        source, rate, reverse_percent, colocated_percent = FLOWKV_TASKS[task]
        asked = WorkloadSpec(source=source, rate=rate, duration_s=1e4, requests_max=100)
        e2e_ms = {}
        for name, cluster in clusters.items():
            summary = serve(cluster, "llama3.1-8b", asked, fabric)
            e2e_ms[name] = summary.e2e_ms.mean
            note = f"TTFT {summary.ttft_ms.mean:,.0f}, TPOT {summary.tpot_ms.mean:.1f} ms"
            report.add(f"flowkv.{task}.{name}.e2e_ms", [summary.e2e_ms.mean], "ms", note=note)
        for name, percent in (("h20_to_l20", reverse_percent), ("colocated", colocated_percent)):
            less = 100 * (1 - e2e_ms["l20_to_h20"] / e2e_ms[name])
            key = f"flowkv.{task}.less_than_{name}_percent"
            report.add(key, [less], "%", note=f"published: {percent:g}")


def flowkv_throughput(report: Report) -> None:
    """Run the homogeneous experiment."""
    fabric = FabricCost(inner_bytes_per_s=24.5e9, latency_ns=2_000_000)  # as fitted to its tables
    clusters = {"split": "A100:prefill,A100:decode", "colocated": "2xA100:mixed"}
    for (prompt, rate), known in FLOWKV_RATES.items():
        source = f"fixed:in={prompt},out=256"
        asked = WorkloadSpec(source=source, rate=rate, duration_s=1e4, requests_max=100)
        for index, (name, cluster) in enumerate(clusters.items()):
            summary = serve(cluster, "llama3.1-8b", asked, fabric)
            published = known[index] if known else None
            note = f"published: {published or 'unknown'}; {256 * rate:g} are asked for"
            key = f"flowkv.{prompt}_{rate:g}.{name}.output_tokens_per_s"
            report.add(key, [summary.output_tokens_per_s], "tokens/s", note=note)


def flowkv_scenarios(report: Report, duration_s: float) -> None:
    """Run the three regimes of its scheduler."""
    base = {"max_queued": 100_000, "usual_ttft_ms": 2000.0, "usual_tpot_ms": 50.0}
    grown = {"workers_min": 4, "workers_max": 8}
    ways = {
        "round_robin": ControllerConfig(policy="round_robin", **base),
        "by_load": ControllerConfig(policy="predicted", **base),
        "changing": ControllerConfig(policy="predicted", is_switching_roles=True, **base),
        "growing": ControllerConfig(policy="predicted", is_switching_roles=True, **base, **grown),
    }
    for scenario, (source, rate) in SCENARIOS.items():
        asked = WorkloadSpec(source=source, rate=rate, duration_s=duration_s, seed=1)
        for name, controller in ways.items():
            cluster = "2xA100:prefill,2xA100:decode"
            seen = simulate(cluster, "llama3.1-8b", asked, FabricCost(), controller=controller)
            summary = summarise(seen, SCENARIO_SLO)
            workers_max = max(len(sample.roles) for sample in seen.samples)
            note = (
                f"E2E {summary.e2e_ms.mean:,.0f} ms, TTFT p99 {summary.ttft_ms.p99:,.0f} ms, "
                f"{summary.flips} role changes, {workers_max} workers at most"
            )
            key = f"flowkv.{scenario}.{name}.good_per_s"
            report.add(key, [summary.goodput_per_s], "good/s", note=note)


def kvdirect(report: Report, prompts: list[int], rates: list[float]) -> None:
    """Run the latency experiment."""
    fabric = FabricCost(card_bytes_per_s=100e9)  # a 400 Gb/s card for every two GPUs
    pair = "H100-tp8:prefill,H100-tp8:decode"
    ways: dict[str, tuple[str, dict[str, object]]] = {
        "colocated": ("2xH100-tp8:mixed", {"max_num_batched_tokens": 1 << 16}),
        "colocated_chunked": ("2xH100-tp8:mixed", {}),
        "pull": (pair, {"handoff": Handoff.WHOLE}),
        "push": (pair, {"handoff": Handoff.PUSH}),
        "streamed": (pair, {"handoff": Handoff.STREAM}),
    }
    savings: dict[str, list[float]] = {}
    for prompt in prompts:
        for output in (128, 512):
            for rate in rates:
                source = f"fixed:in={prompt},out={output}"
                asked = WorkloadSpec(source=source, rate=rate, duration_s=1e5, requests_max=50)
                e2e_ms = {}
                for name, (cluster, settings) in ways.items():
                    seen = simulate(cluster, "llama3.1-70b", asked, fabric, **settings)
                    summary = summarise(seen, Slo())
                    e2e_ms[name] = summary.e2e_ms.mean
                    shares = ", ".join(f"{k} {v:,.0f}" for k, v in parts_ms(summary).items())
                    shares += f"; held {held_ms(seen):,.0f}" if cluster == pair else ""
                    key = f"kvdirect.{prompt}_{output}_{rate:g}.{name}.e2e_ms"
                    report.add(key, [summary.e2e_ms.mean], "ms", note=shares)
                for name in ways:
                    less = 100 * (1 - e2e_ms[name] / e2e_ms["colocated"])
                    savings.setdefault(name, []).append(less)
    for name, each in savings.items():
        if name != "colocated":
            key = f"kvdirect.{name}_less_than_colocated_percent"
            note = f"mean of all loads; published for pull: up to {KVDIRECT_CLAIM:g}"
            report.add(f"{key}_mean", [mean(each)], "%", note=note)
            report.add(f"{key}_max", [max(each)], "%")


def main() -> None:
    """Simulate both and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of each")
    parser.add_argument("--only", choices=CHAPTERS, help="one part, beside kept results")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    report = Report("published", settings={"times of KVDirect's parts": ", ".join(PARTS) + ", ms"})
    if options.only:
        report.resume(options.output)
    prompts, rates = ([8192], [0.5, 2.0]) if options.quick else ([8192, 16384, 32768], [])
    chapters = [options.only] if options.only else CHAPTERS
    if "throughput" in chapters:
        flowkv_throughput(report)
    if "scenarios" in chapters:
        flowkv_scenarios(report, 20.0 if options.quick else 120.0)
    if "mixed" in chapters:
        flowkv(report, ["multi_news"] if options.quick else list(FLOWKV_TASKS))
    if "kvdirect" in chapters:
        kvdirect(report, prompts, rates or [0.25, 0.5, 1.0, 2.0, 4.0])
    report.finish(options.output)


if __name__ == "__main__":
    main()
