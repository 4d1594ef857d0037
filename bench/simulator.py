"""How fast the simulator is: events, decode steps and requests per second of one core.

    python bench/simulator.py --mooncake mooncake_conversation_trace.jsonl.gz
    python bench/simulator.py --quick

Without a trace: sessions of chat on 4 + 4 workers, five runs. With one: all of it on 32 + 32
workers of four H100 with Llama-3.1-70B, once (target: under 60 s of one core). Events are what the
simulated clock calls; a run of decode steps between two things that happen is one. Processor time
is told beside the wall's, as other work on the machine slows down the latter alone.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from report import Report

from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import parse_fleet
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.workload import Arrival

POLICIES = ("least_loaded", "predicted")


def measure(report: Report, name: str, spec: ServeSpec, arrivals: list[Arrival], runs: int) -> None:
    """Simulate `runs` times; note the times of one, and the rates per second of processor."""
    processor_s, wall_s, events, steps = [], [], [], []
    for _ in range(runs):
        cluster = ModelledCluster(spec, arrivals)
        began_s, began_processor_s = time.monotonic(), time.process_time()
        seen = cluster.run(limit_s=1e5)
        wall_s.append(time.monotonic() - began_s)
        processor_s.append(time.process_time() - began_processor_s)
        events.append(cluster.clock.num_called / processor_s[-1])
        steps.append(seen.num_steps / processor_s[-1])
        assert not seen.unfinished
    requests = len(seen.served)
    note = (
        f"{requests:,} requests, {seen.num_steps:,} steps, {seen.ended_ns / 1e9:,.0f} s simulated"
    )
    report.add(f"{name}.processor_s", processor_s, "s", note=note)
    report.add(f"{name}.wall_s", wall_s, "s")
    report.add(f"{name}.events_per_s", events, "1/s")
    report.add(f"{name}.steps_per_s", steps, "1/s")
    report.add(f"{name}.requests_per_s", [requests / s for s in processor_s], "1/s")


def spec_of(cluster: str, model: str, policy: str, seconds_per_sample: int) -> ServeSpec:
    """Return a cluster with one policy."""
    controller = ControllerConfig(policy=policy, max_queued=100_000)
    members = parse_fleet(cluster, model)
    sample_ns = seconds_per_sample * NS_PER_S
    return ServeSpec(members=members, controller=controller, sample_ns=sample_ns)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mooncake", metavar="FILE", help="Mooncake's conversation trace")
    parser.add_argument("--quick", action="store_true", help="three short runs")
    parser.add_argument("--output", metavar="FILE", help="where to keep the results")
    options = parser.parse_args()
    gc.set_threshold(200_000, 50, 50)
    report = Report("simulator")
    duration_s, runs = (60.0, 3) if options.quick else (200.0, 5)
    arrivals = make_workload(WorkloadSpec(source="chat", rate=4.0, duration_s=duration_s))
    for policy in POLICIES:
        spec = spec_of("4xH100:prefill,4xH100:decode", "llama3.1-8b", policy, 1)
        measure(report, f"chat_8.{policy}", spec, arrivals, runs)
    if options.mooncake:
        arrivals = make_workload(WorkloadSpec(source=options.mooncake))
        for policy in POLICIES:
            spec = spec_of("32xH100-tp4:prefill,32xH100-tp4:decode", "llama3.1-70b", policy, 6)
            measure(report, f"mooncake_64.{policy}", spec, arrivals, 1)
    report.finish(options.output)


if __name__ == "__main__":
    main()
