"""`penstock replay LOG`: a recorded run beside its simulation, as it was and with a change.

The two simulations differ in that one thing alone, so their difference is what it would change;
how far the first is from what was recorded says how much to believe it.
"""

import argparse
import re
import sys
from dataclasses import replace
from typing import Final

import msgspec

from penstock.cli.sim import write_page
from penstock.cli.sim_progress import Progress
from penstock.cli.sim_tables import print_columns
from penstock.core.config import ControllerConfig
from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_S, Role
from penstock.sim.calibrate import calibrate
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import Member
from penstock.sim.observe import Observation
from penstock.sim.recording import Recording, read_recording
from penstock.sim.report import render_report
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, Summary, summarise
from penstock.sim.worker_log import read_worker_logs, worker_logs

_GROUP: Final = re.compile(r"(\d+)x(prefill|decode|mixed)")
_DRAIN_S: Final = 600.0


def replay(options: argparse.Namespace) -> int:
    """Simulate a recording; return the exit code.

    Raises: `BadRequest` when the log or the change cannot be understood.
    """
    recording = read_recording(options.log)
    slo = Slo(ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms)
    recorded, fabric = _learn(options.log, recording)
    members = _members(options.cluster, recorded) if options.cluster else recorded
    runs = {"recorded": summarise(_seen(recording), slo)}
    spec = _spec(options, recording, recorded, fabric)
    seen = _simulate(recording, spec, 1.0)
    runs["simulated"] = summarise(seen, slo)
    changed = replace(spec, members=members, controller=_controller(spec.controller, options))
    if changed != spec or options.speed != 1.0:
        seen = _simulate(recording, changed, options.speed)
        runs["changed"] = summarise(seen, slo)
    last = list(runs)[-1]
    if options.report:
        title = f"{options.log}, {last}"
        write_page(options.report, render_report(title, seen, runs[last], slo))
    if options.json:
        sys.stdout.write(msgspec.json.encode(runs).decode() + "\n")
    else:
        _tell(options, runs, slo)
    return 0


def _learn(log: str, recording: Recording) -> tuple[tuple[Member, ...], FabricCost]:
    """Return workers and links as the logs of all of them say, or the controller's log alone."""
    if not worker_logs(log):
        return recording.members(), recording.fabric()
    calibration = calibrate(read_worker_logs(log), recording.workers.values())
    return calibration.members, calibration.fabric


def _spec(
    options: argparse.Namespace,
    recording: Recording,
    members: tuple[Member, ...],
    fabric: FabricCost,
) -> ServeSpec:
    """Return the recorded cluster. All workers that it ever had are there from the start."""
    info = next(iter(recording.workers.values()))
    batched_tokens = options.max_num_batched_tokens or info.max_num_batched_tokens
    if not batched_tokens:
        raise BadRequest(
            f"{options.log} is of a version that did not say how many tokens a step may have: "
            "give --max-num-batched-tokens as it was"
        )
    return ServeSpec(
        members=members,
        controller=msgspec.structs.replace(recording.config, workers_min=0, workers_max=0),
        fabric=fabric,
        layout=info.layout,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        handoff=info.handoff,
        is_prefix_caching=info.is_prefix_caching,
        max_model_len=info.max_model_len,
    )


def _controller(recorded: ControllerConfig, options: argparse.Namespace) -> ControllerConfig:
    """Return what the recorded controller was started with, but for what is to be changed."""
    changes = {"policy": options.policy, "is_switching_roles": options.role_switching}
    asked = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(recorded, **asked)


def _simulate(recording: Recording, spec: ServeSpec, speed: float) -> Observation:
    arrivals = [replace(a, at_ns=int(a.at_ns / speed)) for a in recording.arrivals()]
    last_s = arrivals[-1].at_ns / NS_PER_S
    with Progress(last_s) as progress:
        cluster = ModelledCluster(spec, arrivals)
        return cluster.run(limit_s=last_s + _DRAIN_S, progress=progress.advance)


def _seen(recording: Recording) -> Observation:
    """What was recorded, counted from the first arrival, as if it had been simulated."""
    served = recording.served
    start_ns = served[0].arrived_ns
    moved = [
        replace(
            one,
            arrived_ns=one.arrived_ns - start_ns,
            first_token_ns=one.first_token_ns - start_ns if one.first_token_ns else 0,
            finished_ns=one.finished_ns - start_ns if one.finished_ns else 0,
            timeline=None,
        )
        for one in served
    ]
    ended_ns = max(one.finished_ns for one in moved)
    return Observation(served=moved, ended_ns=ended_ns)


def _members(text: str, recorded: tuple[Member, ...]) -> tuple[Member, ...]:
    """Return workers like the recorded ones: of a role, if there was one of it, else the first."""
    members: list[Member] = []
    for item in text.split(","):
        match = _GROUP.fullmatch(item.strip())
        if match is None:
            raise BadRequest(f"--cluster: {item!r} is not COUNTxROLE, such as 2xprefill")
        role = Role(match[2])
        model = next((m for m in recorded if m.role is role), recorded[0])
        members += [
            Member(f"{role.value}-{i}", role, model.hardware, 0) for i in range(int(match[1]))
        ]
    if len({member.name for member in members}) < max(len(members), 1):
        raise BadRequest(f"--cluster: {text!r} names no worker, or a role twice")
    return tuple(members)


def _tell(options: argparse.Namespace, runs: dict[str, Summary], slo: Slo) -> None:
    print(f"{options.log}: {runs['recorded'].requests} requests\n")
    print_columns(runs)
    print(f"\nwithin: TTFT {slo.ttft_ms:g} ms and TPOT {slo.tpot_ms:g} ms")
    if options.report:
        print(f"pictures in {options.report}")
