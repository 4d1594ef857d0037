"""What does it cost to give a worker another role while it serves?

`penstock serve` with one prefill and two decode workers on the built-in model; six clients send one
request after the other, prompts of which two thirds are one of eight known beginnings. decode-1 is
made a prefill worker and a decode worker again by POST /pd_role_switch, many times. All figures are
from the server's own decision log, on the clock that its processes share:

    to prefill   from the decision until decode-1 begins its first prompt for another worker. The
                 first part of it is the wait until somebody sends a request that is best prefilled
                 there; from then on the target is the step that it is in, and 10 ms
    to decode    from the decision until decode-1 makes the first token of a request that was given
                 to it after that: a whole time to first token, most of it prefill elsewhere
    prefix hits  of the prompts that decode-1 prefills for another worker, the share of the known
                 beginning that it finds in its cache, beside the same of prefill-0
    TTFT         of requests that arrive within 0.25 s after a flip, beside all others

No request may fail, and every flip is one that was really carried out.

    python bench/role_flip.py [--quick] [--concurrency N] [--output FILE]
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import msgspec
from load import Answer, Client, percentile
from report import Report
from serve import closed_loop, server

from penstock.core.events import Event, SetRole, StepDone
from penstock.core.messages import Tokens
from penstock.core.node import LogEntry
from penstock.core.request import Timeline
from penstock.core.types import NS_PER_MS, Role

WORKER = "decode-1"
STEMS, STEM_TOKENS, TAIL_TOKENS, OUTPUT_TOKENS = 8, 256, 128, 32
AFTER_FLIP_MS = 250.0
TARGET_MS = 10.0


@dataclass(frozen=True, slots=True)
class Served:
    """A request as the log has it. Times are in ms; stamps of what did not happen are 0."""

    assigned: float
    arrived: float
    prefill_started: float
    first_token: float
    prefill: str
    decode: str
    cached_tokens: int


@dataclass(slots=True)
class Log:
    """What the controller's decision log says, and how long the worker's own steps were."""

    flips: list[tuple[float, Role]] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0
    retried: int = 0


def body(rng: random.Random, stems: list[list[int]]) -> dict[str, object]:
    """Return a streamed completion: a known beginning and an end that nobody has seen."""
    tail = [rng.randrange(300, 4000) for _ in range(TAIL_TOKENS)]
    return {
        "prompt": rng.choice(stems) + tail,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }


def switch(port: int, role: str) -> None:
    """Give the worker another role, pinned."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/pd_role_switch",
        json.dumps({"worker": WORKER, "new_role": role}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        switched = json.load(answer)
    assert switched["old_role"] != role, switched


async def flip_under_load(
    port: int, stems: list[list[int]], concurrency: int, flips: int, every_s: float
) -> list[Answer]:
    """Keep requests under way while the worker changes sides; return the answers."""
    rng, client = random.Random(1), Client("127.0.0.1", port)
    answers: list[Answer] = []
    end_s = time.perf_counter() + (flips + 1) * every_s

    async def turn() -> None:
        for number in range(flips):
            await asyncio.sleep(every_s)
            await asyncio.to_thread(switch, port, "decode" if number % 2 else "prefill")

    async def one_after_the_other() -> None:
        while time.perf_counter() < end_s:
            answer = await client.complete(body(rng, stems))
            answers.append(answer)

    await asyncio.gather(turn(), *(one_after_the_other() for _ in range(concurrency)))
    client.close()
    return answers


def entries(path: Path) -> Iterator[tuple[LogEntry, Event]]:
    """Yield the decisions of a log."""
    for line in path.read_bytes().splitlines():
        entry = msgspec.json.decode(line, type=LogEntry)
        yield entry, msgspec.convert(entry.event, Event, str_keys=True)


def read_log(path: Path) -> Log:
    """Read the controller's log, and the worker's beside it."""
    log = Log()
    assigned: dict[str, tuple[float, str, str]] = {}
    for entry, event in entries(path):
        at = entry.now_ns / NS_PER_MS
        for command in entry.commands:
            message = command.get("message", {}) if isinstance(command, dict) else {}
            log.failed += message.get("type") == "RequestFailed"
            if message.get("type") == "Assign":
                name = message["request"]["request_id"]
                log.retried += "~" in name
                assigned[name] = at, command["to"], message["decode_worker"]
        if isinstance(event, SetRole):
            log.flips.append((at, event.role))
        elif isinstance(event, Tokens):
            log.served += [
                read_served(output.timeline, *assigned[output.request_id])
                for output in event.outputs
                if output.timeline is not None
            ]
    for _, event in entries(path.with_name(f"{path.name}.{WORKER}.1")):
        if isinstance(event, StepDone):
            log.steps.append((event.started_ns / NS_PER_MS, event.finished_ns / NS_PER_MS))
    return log


def read_served(timeline: Timeline, assigned: float, prefill: str, decode: str) -> Served:
    """Return a request from its timeline and its assignment."""
    return Served(
        assigned=assigned,
        arrived=timeline.arrived_ns / NS_PER_MS,
        prefill_started=timeline.prefill_started_ns / NS_PER_MS,
        first_token=timeline.first_token_ns / NS_PER_MS,
        prefill=prefill,
        decode=decode,
        cached_tokens=timeline.cached_tokens,
    )


def add_delays(report: Report, log: Log) -> None:
    """Add the times from decisions to first steps, and what they should be below."""
    rows: dict[str, list[float]] = {"prefill": [], "decode": [], "wait": [], "step": []}
    limits: list[float] = []
    for index, (at, role) in enumerate(log.flips):
        end = log.flips[index + 1][0] if index + 1 < len(log.flips) else float("inf")
        given = [s for s in log.served if at <= s.assigned < end]
        if role is Role.PREFILL:
            given = [s for s in given if s.prefill == WORKER != s.decode]
            if not given:
                continue
            first = min(given, key=lambda one: one.prefill_started)
            rows["prefill"].append(first.prefill_started - at)
            rows["wait"].append(first.assigned - at)
            rows["step"].append(first.prefill_started - first.assigned)
            limits.append(step_under_way(log, first.assigned) + TARGET_MS)
        elif given := [s for s in given if s.decode == WORKER != s.prefill]:
            rows["decode"].append(min(s.first_token for s in given) - at)
    asked = sum(role is Role.PREFILL for _, role in log.flips)
    met = [took <= limit for took, limit in zip(rows["step"], limits, strict=True)]
    note = f"{sum(met)} of {asked}; {asked - len(met)} were given nothing before the next"
    report.add("decision_to_first_prefill_ms", rows["prefill"], "ms")
    report.add("of_which_until_a_request_ms", rows["wait"], "ms")
    report.add("of_which_at_the_worker_ms", rows["step"], "ms")
    report.add("one_step_and_10_ms", limits, "ms", note="the target, by the step it was in")
    report.add("flips_within_target", [sum(met) / asked], note=note)
    report.add("decision_to_first_decode_ms", rows["decode"], "ms", note="a whole prefill within")


def step_under_way(log: Log, at: float) -> float:
    """Return how long the step was in which the worker was at that time; its usual one if none."""
    index = bisect_right(log.steps, (at, 1e18)) - 1
    start, end = log.steps[max(index, 0)]
    usual = statistics.median(b - a for a, b in log.steps)
    return end - start if start <= at <= end else usual


def add_hits(report: Report, log: Log) -> None:
    """Add how much of the known beginnings is found where prompts are computed."""
    first_half = {"kept": [], "others": []}
    for one in log.served:
        if one.prefill == one.decode:
            continue
        where = "kept" if one.prefill == WORKER else "others"
        first_half[where].append(min(one.cached_tokens / STEM_TOKENS, 1.0))
    means = {name: statistics.mean(values) for name, values in first_half.items()}
    counts = {name: len(values) for name, values in first_half.items()}
    report.add("prefix_hits_flipped", [means["kept"]], note=f"{counts['kept']} prompts")
    report.add("prefix_hits_prefill_0", [means["others"]], note=f"{counts['others']} prompts")


def add_ttft(report: Report, log: Log) -> None:
    """Add TTFT as the server saw it, right after flips and at other times."""
    at = [time_ms for time_ms, _ in log.flips]
    rows: dict[str, list[float]] = {"after_flip": [], "else": []}
    for one in log.served:
        index = bisect_right(at, one.arrived) - 1
        is_after = index >= 0 and one.arrived - at[index] <= AFTER_FLIP_MS
        rows["after_flip" if is_after else "else"].append(one.first_token - one.arrived)
    for name, values in rows.items():
        report.add(f"ttft_p50_ms_{name}", [percentile(values, 0.5)], "ms", note=f"{len(values)}")
        report.add(f"ttft_p99_ms_{name}", [percentile(values, 0.99)], "ms")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within 45 s")
    parser.add_argument("--concurrency", type=int, default=6, help="requests under way")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    report = Report("role_flip", settings={"model": "penstock-tiny", "workers": "1P + 2D"})
    flips, every_s = (24, 0.7) if args.quick else (80, 1.0)
    rng = random.Random(0)
    stems = [[rng.randrange(300, 4000) for _ in range(STEM_TOKENS)] for _ in range(STEMS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        flags = ["--prefill", "1", "--decode", "2", "--threads", "1", "--no-role-switching"]
        with server(*flags, "--decision-log", str(path)) as port:
            warm = [body(rng, stems) for _ in range(64)]
            answers, _ = asyncio.run(closed_loop(port, warm, args.concurrency))
            answers += asyncio.run(flip_under_load(port, stems, args.concurrency, flips, every_s))
        log = read_log(path)
    failed = sum(not answer.is_complete for answer in answers)
    report.add("requests", [float(len(answers))])
    report.add("flips", [float(len(log.flips))])
    report.add("requests_failed", [float(failed + log.failed)])
    report.add("requests_retried", [float(log.retried)])
    assert len(log.flips) == flips, log.flips
    assert all(a[1] != b[1] for a, b in pairwise(log.flips)), log.flips
    add_delays(report, log)
    add_hits(report, log)
    add_ttft(report, log)
    report.finish(args.output)


if __name__ == "__main__":
    main()
