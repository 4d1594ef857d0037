"""`penstock sim`: compose a simulated cluster from options, run it, and tell what came of it.

The table goes to standard output, progress to standard error; with `--json` standard output is one
JSON object and nothing else.
"""

import argparse
import gc
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from penstock.cli.sim_progress import Progress
from penstock.cli.sim_tables import print_summary
from penstock.core.config import ControllerConfig
from penstock.core.errors import BadRequest, StartupFailed
from penstock.core.types import NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import describe_fleet, num_gpus, parse_fleet
from penstock.sim.report import render_report
from penstock.sim.serve import Fault, ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, summarise

_FAULT: Final = re.compile(r"(kill|slow):([\w-]+)@([\d.]+)(?:x([\d.]+))?")
_SAMPLES: Final = 600
_DRAIN_S: Final = 3600.0
"""How long after the last arrival a run goes on for what is still under way."""


def sim(options: argparse.Namespace) -> int:
    """Do what `penstock sim ACT` says; return the exit code.

    Raises: `BadRequest` for what cannot be simulated, `StartupFailed` for a file that cannot be
    written.
    """
    # Requests and messages come and go by the million and form no cycles; looking for some after
    # every seven hundred of them costs a third of the time.
    gc.set_threshold(200_000, 50, 50)
    match options.act:
        case "serve":
            return _serve(options)
        case "sweep":
            from penstock.cli.sim_sweep import sweep

            return sweep(options)
        case "memory":
            from penstock.cli.sim_memory import memory

            return memory(options)
        case "reuse":
            from penstock.cli.sim_reuse import reuse

            return reuse(options)
        case act:
            raise AssertionError(act)


def _serve(options: argparse.Namespace) -> int:
    members = parse_fleet(options.cluster, options.model, gpus_per_host=options.gpus_per_host)
    arrivals = make_workload(workload_of(options))
    faults = [_parse_fault(text, {m.name for m in members}) for text in options.fault]
    slo = slo_of(options)
    last_s = arrivals[-1].at_ns / NS_PER_S
    # Some hundreds of looks at everybody make a picture; more only take time.
    sample_ns = max(NS_PER_S, int(last_s / _SAMPLES * NS_PER_S))
    controller = elastic(options, len(members))
    spec = replace(spec_of(options, options.cluster), sample_ns=sample_ns, controller=controller)
    cluster = ModelledCluster(spec, arrivals)
    began_s = time.monotonic()
    with Progress(last_s) as progress:
        seen = cluster.run(limit_s=last_s + _DRAIN_S, faults=faults, progress=progress.advance)
    took_s = time.monotonic() - began_s
    summary = summarise(seen, slo)
    title = f"{options.workload} on {describe_fleet(members)}"
    if options.report:
        write_page(options.report, render_report(title, seen, summary, slo))
    if options.json:
        record = msgspec.to_builtins(summary)
        settings = {
            "workload": options.workload,
            "cluster": describe_fleet(members),
            "model": options.model,
            "policy": options.policy,
            "gpus": num_gpus(members),
            "slo": msgspec.to_builtins(slo),
            "seed": options.seed,
        }
        sys.stdout.write(msgspec.json.encode({"settings": settings, **record}).decode() + "\n")
    else:
        print_summary(title, summary, slo, took_s)
        if options.report:
            print(f"\npictures in {options.report}")
    return 0


def workload_of(options: argparse.Namespace) -> WorkloadSpec:
    """Return the load that the options ask for."""
    return WorkloadSpec(
        source=options.workload,
        rate=options.rate,
        duration_s=options.duration,
        cv=options.burstiness,
        seed=options.seed,
        requests_max=options.requests,
    )


def slo_of(options: argparse.Namespace) -> Slo:
    """Return the limits that the options ask for."""
    return Slo(ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms)


def controller_of(options: argparse.Namespace) -> ControllerConfig:
    """Return the controller that the options ask for.

    The limits tell it what loads are measured by; promises that it refuses requests for they are
    only when asked for.
    """
    ttft_ms, tpot_ms = options.slo_ttft_ms, options.slo_tpot_ms
    return ControllerConfig(
        policy=options.policy,
        slo_ttft_ms=ttft_ms if options.admission else None,
        slo_tpot_ms=tpot_ms if options.admission else None,
        usual_ttft_ms=ttft_ms,
        usual_tpot_ms=tpot_ms,
        is_switching_roles=options.role_switching,
        max_queued=options.max_queued,
    )


def elastic(options: argparse.Namespace, num_workers: int) -> ControllerConfig:
    """Return the controller that the options ask for, which may start and retire workers.

    Raises: `BadRequest` for limits that the cluster does not begin within.
    """
    config, least, most = controller_of(options), options.min_workers, options.max_workers
    if not least and not most:
        return config
    least, most = least or num_workers, most or num_workers
    if not least <= num_workers <= most:
        raise BadRequest(
            f"--min-workers {least} --max-workers {most}: the cluster begins with {num_workers}"
        )
    return msgspec.structs.replace(config, workers_min=least, workers_max=most)


def spec_of(options: argparse.Namespace, cluster: str) -> ServeSpec:
    """Return the cluster of the text `cluster` with everything else from the options."""
    bytes_per_s = 1e9 / 8
    return ServeSpec(
        members=parse_fleet(cluster, options.model, gpus_per_host=options.gpus_per_host),
        controller=controller_of(options),
        fabric=FabricCost(
            latency_ns=int(options.link_us * 1000),
            span_ns=int(options.span_us * 1000),
            card_bytes_per_s=options.link_gbps * bytes_per_s,
            inner_bytes_per_s=options.inner_gbps * bytes_per_s,
        ),
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        is_prefix_caching=not options.no_prefix_caching,
    )


def _parse_fault(text: str, names: set[str]) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None or (match[1] == "slow") != bool(match[4]):
        raise BadRequest(
            f"--fault {text!r} is neither kill:NAME@SECONDS nor slow:NAME@SECONDSxFACTOR"
        )
    _, name, at_s, factor = match.groups()
    if name not in names:
        raise BadRequest(f"--fault {text!r}: workers are {', '.join(sorted(names))}")
    return Fault(name, int(float(at_s) * NS_PER_S), 1 / float(factor) if factor else 0.0)


def write_page(path: str, text: str) -> None:
    """Write a page. Raises: `StartupFailed` when it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StartupFailed(f"--report {path}: {error.strerror}") from error
