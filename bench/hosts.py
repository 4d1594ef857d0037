"""Who is given what when workers of one host are near each other and hosts are far apart?

    python bench/hosts.py [--quick] [--links GBPS ...] [--seeds N] [--output FILE]
    python bench/hosts.py --ours --add        our rule and the limit anew, beside kept results

Simulated: the controller and workers that serve, over kernel times of H100 with Llama-3.1-8B and
links that are shared. Four hosts, each with two prefill and two decode workers behind one network
card; prompts of 4,000 tokens in the mean (0.5 GB of KV), answers of 128, at 60 requests/s: all of
that over the cards would be 64 Gb/s each way of every host. `limit` is our rule where hosts are as
near each other as the workers of one. The figures are those of the code and do not depend on this
machine. Every figure is one of each seed.
"""

import argparse
import gc
from dataclasses import dataclass

from report import Report

from penstock.control.policies import POLICIES
from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import parse_fleet
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, Summary, summarise

NUM_HOSTS = 4
HOST = "2xH100:prefill,2xH100:decode"
RATE, DURATION_S, QUICK_S = 60.0, 60.0, 15.0
LIMIT_S = 600.0
SLO = Slo(ttft_ms=2000, tpot_ms=50)
BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Way:
    """One rule over cards of so many bytes per second."""

    name: str
    policy: str
    card_bytes_per_s: float


def ways(link_gbps: float, num_others: int) -> list[Way]:
    """Return what is compared over one kind of link, ours first and last."""
    others = [name for name in POLICIES if name != "predicted"]
    card = link_gbps * BYTES_PER_GBIT
    found = [Way(name, name, card) for name in ["predicted", *others[:num_others]]]
    return [*found, Way("limit", "predicted", FabricCost().inner_bytes_per_s)]


def measure(way: Way, seed: int, duration_s: float) -> Summary:
    """Simulate one rule under one load."""
    load = WorkloadSpec(
        source="lognormal:in=4000,out=128,sigma=0.5", rate=RATE, duration_s=duration_s, seed=seed
    )
    members = parse_fleet(",".join([HOST] * NUM_HOSTS), "llama3.1-8b", gpus_per_host=4)
    controller = ControllerConfig(
        policy=way.policy,
        usual_ttft_ms=SLO.ttft_ms,
        usual_tpot_ms=SLO.tpot_ms,
        is_switching_roles=False,
        max_queued=100_000,
    )
    fabric = FabricCost(card_bytes_per_s=way.card_bytes_per_s)
    spec = ServeSpec(members=members, controller=controller, fabric=fabric, sample_ns=5 * NS_PER_S)
    return summarise(ModelledCluster(spec, make_workload(load)).run(limit_s=LIMIT_S), SLO)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one link, two rules, within 45 s")
    parser.add_argument("--links", type=float, nargs="+", metavar="GBPS", help="of a host's card")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many, from 1 on")
    parser.add_argument("--ours", action="store_true", help="not the classic rules")
    parser.add_argument("--add", action="store_true", help="to the results that are kept already")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    links = options.links or ([25.0] if options.quick else [25.0, 100.0, 200.0])
    duration_s = QUICK_S if options.quick else DURATION_S
    settings = {"cluster": f"{NUM_HOSTS} hosts of {HOST}", "requests_per_s": RATE}
    report = Report("hosts", settings=settings)
    if options.add:
        report.resume(options.output)
    num_others = 0 if options.ours else 1 if options.quick else len(POLICIES)
    for link_gbps in links:
        print(f"\ncards of {link_gbps:g} Gb/s; TTFT within {SLO.ttft_ms:g} ms")
        for way in ways(link_gbps, num_others):
            runs = [measure(way, seed, duration_s) for seed in range(1, options.seeds + 1)]
            name = f"{way.name}_{link_gbps:g}"
            report.add(f"{name}.good_per_s", [run.goodput_per_s for run in runs], "good/s")
            report.add(f"{name}.ttft_mean_ms", [run.ttft_ms.mean for run in runs], "ms")
            report.add(f"{name}.ttft_p99_ms", [run.ttft_ms.p99 for run in runs], "ms")
            report.keep(options.output)
    report.finish(options.output)


if __name__ == "__main__":
    main()
