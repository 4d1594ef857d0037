"""Does the simulator, calibrated from a real run, predict a real run?

`penstock serve` with the built-in model takes open-loop Poisson load at three rates in turns, as
one prefill and one decode worker and as one mixed worker. Steps, pulls and messages of the turns
at the *middle* rate calibrate the simulator (`penstock/sim/calibrate.py`): step times are fitted,
what lay beside them is drawn from what was seen. The turns at the *other* rates, of which it has
seen nothing, are then simulated with the arrivals and lengths that were sent, several times with
other draws, and compared with what the clients got. The table also has the middle rate predicted
from itself: how much of an error is the model's, and how much the difference between the turns.

A machine that does something else meanwhile is another machine at every turn. The share of its
processors that other programs used is measured; turns with more than 10 % are left out as long as
half are left. Figures of a busy machine say little all the same: how far two halves of the real
turns are from each other stands beside each error.

    python bench/sim_vs_real.py [--quick] [--only pd|mixed] [--keep FOLDER] [--output FILE]
    python bench/sim_vs_real.py --recorded FOLDER     # a run that was kept, simulated again
"""

import argparse
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from load import percentile
from recorded_run import KEY_TOKENS, Plan, Segment, record, recorded
from report import Report

from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_S, WorkerId
from penstock.sim.calibrate import Calibration, calibrate
from penstock.sim.recording import Recording, read_recording
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.worker_log import Taken, read_worker_logs
from penstock.sim.workload import Arrival

POLICY = "predicted"
BATCHED_TOKENS = 512
CONTROLLER = ControllerConfig(policy=POLICY, is_switching_roles=True)
COMMON = [
    *("--threads", "1", "--policy", POLICY, "--role-switching"),
    *("--max-num-batched-tokens", str(BATCHED_TOKENS)),
]
CLUSTERS = {
    "pd": ["--prefill", "1", "--decode", "1", *COMMON],
    "mixed": ["--prefill", "0", "--decode", "0", "--mixed", "1", *COMMON],
}
DRAIN_S = 600.0
SEEDS = 5
"""Simulated runs of each real one: what is drawn differs."""
RATES = (0.4, 0.25, 0.55)
"""Shares of capacity; the first calibrates, the others are predicted."""
TARGETS = {"p50": 0.10, "p99": 0.25}
BUSY_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """One request as sent and as answered; times in ns."""

    sent_ns: int
    prompt: tuple[int, ...]
    output_tokens: int
    inbound_ns: int
    """From the client to the controller."""
    outbound_ns: int | None
    """The first token's way from the controller to the client; None where that cannot be told
    because some tokens came with others."""
    ttft_ms: float
    tpot_ms: float


Figures = tuple[list[float], list[float]]
"""TTFT and TPOT of requests, in ms."""


def requests_of(segment: Segment, recording: Recording) -> list[Request]:
    """Return what was sent in a segment, each beside what the controller saw of it."""
    known = {
        tuple(request.prompt_token_ids[:KEY_TOKENS]): (request, served)
        for request, served in recording.requests
    }
    requests = []
    for sent in segment.sent:
        request, served = known[sent.key]
        sent_ns = int(sent.answer.sent_s * NS_PER_S)
        outbound_ns = int(sent.answer.token_s[0] * NS_PER_S) - served.first_token_ns
        requests.append(
            Request(
                sent_ns,
                request.prompt_token_ids,
                served.num_tokens,
                max(recording.submitted_ns[request.request_id] - sent_ns, 0),
                max(outbound_ns, 0) if sent.answer.is_token_by_token else None,
                sent.answer.ttft_s * 1e3,
                sent.answer.tpot_s * 1e3,
            )
        )
    return requests


def simulate(
    calibration: Calibration, recording: Recording, turns: list[list[Request]], inbound: list[int]
) -> list[Figures]:
    """Return TTFT and TPOT of the requests of each turn on the calibrated cluster, `SEEDS` times.

    The whole run is simulated, warm-up included: the controller learns while it serves.
    """
    info = next(iter(recording.workers.values()))
    spec = ServeSpec(
        members=calibration.members,
        controller=CONTROLLER,
        fabric=calibration.fabric,
        layout=info.layout,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=BATCHED_TOKENS,
        max_model_len=info.max_model_len,
    )
    simulated: list[Figures] = [([], []) for _ in turns]
    for seed in range(SEEDS):
        seen = simulate_once(replace(spec, seed=seed), recording, turns, inbound)
        for into, turn in zip(simulated, turns, strict=True):
            extend(into, ([seen[r.prompt][0] for r in turn], [seen[r.prompt][1] for r in turn]))
    return simulated


def simulate_once(
    spec: ServeSpec, recording: Recording, turns: list[list[Request]], inbound: list[int]
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Return TTFT and TPOT in ms by prompt, with what is drawn drawn by the spec's seed."""
    rng = random.Random(spec.seed)
    start_ns = recording.requests[0][1].arrived_ns - NS_PER_S // 10
    sent = {request.prompt: request for turn in turns for request in turn}
    coming: list[tuple[int, Request | None, Arrival]] = []
    for request, served in recording.requests:
        known = sent.get(request.prompt_token_ids)
        submitted_ns = recording.submitted_ns[request.request_id]
        begins_ns = submitted_ns if known is None else known.sent_ns + rng.choice(inbound)
        pieces = tuple((token_id, 1) for token_id in request.prompt_token_ids)
        at_ns = begins_ns - start_ns
        coming.append((at_ns, known, Arrival(at_ns, pieces, served.num_tokens)))
    coming.sort(key=lambda each: each[0])
    cluster = ModelledCluster(spec, [arrival for _, _, arrival in coming])
    seen = cluster.run(limit_s=coming[-1][0] / NS_PER_S + DRAIN_S)
    assert seen.unfinished == 0, f"{seen.unfinished} requests were not answered in simulation"
    return {
        known.prompt: (
            (served.first_token_ns - (known.sent_ns - start_ns)) / 1e6,
            served.tpot_s * 1e3,
        )
        for served, (_, known, _) in zip(seen.served, coming, strict=True)
        if known is not None
    }


def real(requests: list[Request]) -> Figures:
    """Return what the clients got."""
    return [r.ttft_ms for r in requests], [r.tpot_ms for r in requests]


def compare(report: Report, name: str, was: list[Figures], predicted: list[Figures]) -> None:
    """Print and keep real, simulated and error of the four figures of some turns.

    Beside them is how far the machine is from itself: every other turn beside those between. No
    prediction can be expected to be nearer.
    """
    halves = [pooled(was[0::2]), pooled(was[1::2])] if len(was) > 1 else []
    real_all, simulated_all = pooled(was), pooled(predicted)
    for which, label in enumerate(("ttft", "tpot")):
        for share, rank in ((0.5, "p50"), (0.99, "p99")):
            truth, guess = (percentile(of[which], share) for of in (real_all, simulated_all))
            error = guess / truth - 1
            verdict = "met" if abs(error) <= TARGETS[rank] else "missed"
            key = f"{name}_{label}_{rank}"
            report.figures |= {
                f"{key}_real_ms": truth,
                f"{key}_simulated_ms": guess,
                f"{key}_error": abs(error),
            }
            apart = ""
            if halves:
                one, other = (percentile(half[which], share) for half in halves)
                report.figures[f"{key}_real_halves_apart"] = abs(one / other - 1)
                apart = f"; real halves {abs(one / other - 1):.0%} apart"
            print(
                f"  {name:<16} {label} {rank}  {truth:>8.2f} {guess:>8.2f} ms {error:>+7.1%}"
                f"  target {TARGETS[rank]:.0%}: {verdict}{apart}"
            )


def pooled(turns: list[Figures]) -> Figures:
    """Return the figures of all these turns together."""
    together: Figures = ([], [])
    for turn in turns:
        extend(together, turn)
    return together


def evaluate(report: Report, name: str, segments: list[Segment], log: Path) -> None:
    """Calibrate on the segments of the first rate and predict the others."""
    recording = read_recording(str(log))
    by_rate: dict[float, list[Segment]] = {}
    for segment in segments:
        by_rate.setdefault(segment.rate, []).append(segment)
    turns = {rate: quiet(those) for rate, those in by_rate.items()}
    own = segments[0].rate
    taken, seen = Taken(), []
    for segment in turns[own]:
        taken.add(read_worker_logs(str(log), (segment.begin_ns, segment.end_ns)))
        seen += requests_of(segment, recording)
    front_ns = [r.outbound_ns for r in seen if r.outbound_ns is not None]
    inbound = [request.inbound_ns for request in seen]
    calibration = calibrate(taken, recording.workers.values(), front_ns)
    show(calibration, taken)
    requests = {
        rate: [requests_of(turn, recording) for turn in those] for rate, those in turns.items()
    }
    flat = [turn for those in requests.values() for turn in those]
    simulated = iter(simulate(calibration, recording, flat, inbound))
    num_real = sum(map(len, flat))
    print(f"  {name}: {num_real} real requests; real, simulated, and how far it is off")
    report.figures |= {f"{name}_turns_kept": len(flat), f"{name}_requests": num_real}
    others: tuple[list[Figures], list[Figures]] = ([], [])
    for rate, those in requests.items():
        was = [real(turn) for turn in those]
        guess = [next(simulated) for _ in those]
        is_own = rate == own
        part = "itself" if is_own else f"at_{rate / own * RATES[0]:.2f}"
        compare(report, f"{name}_{part}", was, guess)
        if not is_own:
            others[0].extend(was)
            others[1].extend(guess)
    compare(report, name, *others)


def quiet(turns: list[Segment]) -> list[Segment]:
    """Return the turns in which others let the machine alone, and at least the quieter half."""
    ordered = sorted(turns, key=lambda turn: turn.others_share)
    half = ordered[: (len(ordered) + 1) // 2]
    kept = [turn for turn in turns if turn in half or turn.others_share <= BUSY_SHARE]
    shares = " ".join(f"{turn.others_share:.0%}" for turn in kept)
    print(f"  {turns[0].rate:.1f} requests/s: {len(kept)} of {len(turns)} turns; others: {shares}")
    return kept


def extend(into: Figures, more: Figures) -> None:
    """Add the figures of more requests."""
    into[0].extend(more[0])
    into[1].extend(more[1])


def show(calibration: Calibration, taken: Taken) -> None:
    """Print what was learnt."""
    for member in calibration.members:
        times, steps = member.hardware.times, taken.steps.get(WorkerId(member.name), [])
        print(
            f"  {member.name}: {len(steps)} steps; prefill {times.a:.3f}"
            f" + {times.b * 1e3:.2f}e-3 S + {times.c:.2e} W, decode {times.d:.3f}"
            f" + {times.e:.4f} batch + {times.f:.2e} context ms"
        )
        assert member.hardware.spread is not None
        bends = member.hardware.spread.bends
        print("    bent by", " ".join(f"{batch}: {bend:.2f}" for batch, bend in bends.items()))
        for kind, ratios in member.hardware.spread.ratios.items():
            what = "prefill" if kind.has_prefill else "decode"
            what += " of a newcomer" if kind.has_newcomer else ""
            where = "beside another" if kind.is_crowded else "alone"
            p99 = percentile(list(ratios), 0.99)
            print(
                f"    {what} below {2**kind.size / 1e6:.2g} ms {where}: {len(ratios)} ratios,"
                f" median {statistics.median(ratios):.2f}, p99 {p99:.2f}"
            )
    for kind, seen_ns in taken.messages_ns.items():
        print(f"    {kind}: {len(seen_ns)}, median {statistics.median(seen_ns) / 1e3:.0f} us")


def bench(report: Report, name: str, plan: Plan | None, folder: Path) -> None:
    """Record one cluster, unless it has been recorded before, and compare."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "decisions.log"
    segments = recorded(log) if plan is None else record(CLUSTERS[name], plan, log)
    others = statistics.mean(segment.others_share for segment in segments)
    report.figures[f"{name}_others_processor_share"] = others
    print(f"  {name}: other programs used {others:.0%} of the processors", flush=True)
    if others > BUSY_SHARE:
        print("  this machine is busy with something else: expect errors that are not the model's")
    evaluate(report, name, segments, log)


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within 45 s; the p99 is of few")
    parser.add_argument("--only", choices=tuple(CLUSTERS), help="one of the two clusters")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    parser.add_argument("--keep", help="folder for the decision logs; default: they are deleted")
    parser.add_argument("--recorded", help="folder of a run that was kept: nothing is served")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    rounds, seconds = (1, 3.0) if args.quick else (8, 4.0)
    plan = Plan(RATES, rounds, seconds, args.seed)
    settings: dict[str, object] = {
        "calibrated at": f"{RATES[0]:g} of capacity",
        "predicted at": " and ".join(f"{share:g}" for share in RATES[1:]),
    }
    if not args.recorded:
        settings["turns"] = f"{rounds} of {seconds:g} s at each rate, in turns"
    report = Report("sim_vs_real", settings=settings)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else CLUSTERS:
            where = Path(args.recorded or args.keep or folder) / name
            bench(report, name, None if args.recorded else plan, where)
    for key in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"):
        errors = [report.figures.get(f"{name}_{key}_error", 0.0) for name in CLUSTERS]
        report.figures[f"{key}_error"] = max(errors)
    report.finish(args.output)


if __name__ == "__main__":
    main()
