"""Experiments that FlowKV and KVDirect published, simulated in shape beside their figures.

    python bench/published.py            both, within a minute
    python bench/published.py --quick    a part of each, a few seconds

FlowKV's heterogeneous cluster: four L20 and four H20, Llama-3.1-8B, lengths of three LongBench
tasks: L20 prefill with H20 decode, the reverse, and all eight doing both. KVDirect's latency:
Llama-3.1-70B on eight GPUs a worker, prompts of 8K to 32K, outputs of 128 and 512, rising rates:
two workers doing both (co-located), or one of either role with the KV pulled, and where a request's
time goes. Same hardware on both sides of every comparison.

What differs from the papers: GPUs of KVDirect are not published (H100 here); step times are sums
of kernel times; our co-located baseline computes prompts in chunks, as theirs did not; LongBench's
answers are taken to be as long as its table allows. KVDirect's push, where room is reserved before
the prefill begins, is not something that our workers do, so it is not here. The figures do not
depend on this machine.
"""

import argparse
import gc
from statistics import mean

from report import Report

from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import parse_fleet
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
PARTS = ("queue", "prefill", "transfer", "decode_queue", "decode")


def serve(cluster: str, model: str, asked: WorkloadSpec, fabric: FabricCost) -> Summary:
    """Return the figures of one cluster under one load, all requests served to the end."""
    arrivals = make_workload(asked)
    controller = ControllerConfig(policy="least_loaded", max_queued=100_000)
    spec = ServeSpec(
        members=parse_fleet(cluster, model),
        controller=controller,
        fabric=fabric,
        sample_ns=60 * NS_PER_S,
    )
    return summarise(ModelledCluster(spec, arrivals).run(limit_s=1e5), Slo())


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


def kvdirect(report: Report, prompts: list[int], rates: list[float]) -> None:
    """Run the latency experiment."""
    fabric = FabricCost(card_bytes_per_s=100e9)  # a 400 Gb/s card for every two GPUs
    clusters = {
        "colocated": "2xH100-tp8:mixed",
        "pull": "H100-tp8:prefill,H100-tp8:decode",
    }
    savings = []
    for prompt in prompts:
        for output in (128, 512):
            for rate in rates:
                source = f"fixed:in={prompt},out={output}"
                asked = WorkloadSpec(source=source, rate=rate, duration_s=1e5, requests_max=50)
                e2e_ms = {}
                for name, cluster in clusters.items():
                    summary = serve(cluster, "llama3.1-70b", asked, fabric)
                    e2e_ms[name] = summary.e2e_ms.mean
                    shares = ", ".join(f"{k} {v:,.0f}" for k, v in parts_ms(summary).items())
                    key = f"kvdirect.{prompt}_{output}_{rate:g}.{name}.e2e_ms"
                    report.add(key, [summary.e2e_ms.mean], "ms", note=shares)
                savings.append(100 * (1 - e2e_ms["pull"] / e2e_ms["colocated"]))
    note = f"mean of all loads; published: up to {KVDIRECT_CLAIM:g}"
    report.add("kvdirect.less_than_colocated_percent_mean", [mean(savings)], "%", note=note)
    report.add("kvdirect.less_than_colocated_percent_max", [max(savings)], "%")


def main() -> None:
    """Simulate both and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of each")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    report = Report("published", settings={"times of KVDirect's parts": ", ".join(PARTS) + ", ms"})
    flowkv(report, ["multi_news"] if options.quick else list(FLOWKV_TASKS))
    prompts, rates = ([8192], [0.5, 2.0]) if options.quick else ([8192, 16384, 32768], [])
    kvdirect(report, prompts, rates or [0.25, 0.5, 1.0, 2.0, 4.0])
    report.finish(options.output)


if __name__ == "__main__":
    main()
