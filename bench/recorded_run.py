"""A real cluster under open-loop load, with its decision logs and what its clients saw.

`record` starts `penstock serve` with a decision log, sends requests at random times at several
rates in turns, and returns each turn as a `Segment`; `recorded` reads them from the file that it
leaves beside the log. Used by `bench/sim_vs_real.py`.
"""

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from load import Answer, Client
from serve import closed_loop, request_body, server

PROMPT_TOKENS = (64, 1024)
OUTPUT_TOKENS = (16, 128)
"""Between these any length is sent, short ones as often as twice as long ones. With a few lengths
only, a median may lie in the gap between the times of two of them, and jumps at a single request.
"""
WARM_UP = 24
AT_ONCE = 8
KEY_TOKENS = 8
"""First tokens of a prompt, by which a request is found again in the log."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One request and what its client got."""

    key: tuple[int, ...]
    answer: Answer


@dataclass(slots=True)
class Segment:
    """Some seconds of load at `rate` requests per second; times are the monotonic clock's."""

    rate: float
    begin_ns: int = 0
    end_ns: int = 0
    sent: list[Sent] = field(default_factory=list)
    others_share: float = 0.0
    """Of all processors' time, what processes that are not ours have used meanwhile."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What load to send: `rates` are shares of what the cluster can do, each `rounds` times for
    `seconds`.
    """

    rates: tuple[float, ...]
    rounds: int
    seconds: float
    seed: int


def record(flags: list[str], plan: Plan, log: Path) -> list[Segment]:
    """Return the segments of a run; its decision logs are `log` and `log`.WORKER.EPOCH."""
    with server(*flags, "--decision-log", str(log)) as port:
        segments = asyncio.run(_drive(port, plan))
    _segments_of(log).write_bytes(msgspec.json.encode(segments))
    return segments


def recorded(log: Path) -> list[Segment]:
    """Return the segments of a run that has been recorded before."""
    segments = msgspec.json.decode(_segments_of(log).read_bytes(), type=list[Segment])
    for segment in segments:
        _check(segment)
    return segments


def _segments_of(log: Path) -> Path:
    return log.parent / "segments.json"


async def _drive(port: int, plan: Plan) -> list[Segment]:
    rng = random.Random(plan.seed)
    bodies = [_body(rng) for _ in range(2 * WARM_UP)]
    await closed_loop(port, bodies[:WARM_UP], AT_ONCE)
    answers, took_s = await closed_loop(port, bodies[WARM_UP:], AT_ONCE)
    capacity = len(answers) / took_s
    print(f"  about {capacity:.1f} requests/s at most", flush=True)
    return [
        await _poisson(port, share * capacity, plan.seconds, rng)
        for _ in range(plan.rounds)
        for share in plan.rates
    ]


async def _poisson(port: int, rate: float, seconds: float, rng: random.Random) -> Segment:
    """Send a request, and more at random times for a while, and wait for the last answer."""
    client = Client("127.0.0.1", port)
    segment = Segment(rate, time.monotonic_ns())
    used_before_s = _processor_seconds()
    tasks: list[tuple[tuple[int, ...], asyncio.Task[Answer]]] = []
    start_s = at_s = time.perf_counter()
    while at_s < start_s + seconds:
        body = _body(rng)
        await asyncio.sleep(at_s - time.perf_counter())
        prompt = body["prompt"]
        assert isinstance(prompt, list)
        tasks.append((tuple(prompt[:KEY_TOKENS]), asyncio.create_task(client.complete(body))))
        at_s += rng.expovariate(rate)
    segment.sent = [Sent(key, await task) for key, task in tasks]
    client.close()
    segment.end_ns = time.monotonic_ns()
    everybody_s, ours_s = (
        now - before for now, before in zip(_processor_seconds(), used_before_s, strict=True)
    )
    there_s = (segment.end_ns - segment.begin_ns) / 1e9 * (os.cpu_count() or 1)
    segment.others_share = max(everybody_s - ours_s, 0.0) / there_s
    _check(segment)
    return segment


def _check(segment: Segment) -> None:
    bad = [s.answer.status for s in segment.sent if not s.answer.is_complete]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(segment.sent)} requests failed: {bad[:5]}")


def _body(rng: random.Random) -> dict[str, object]:
    return request_body(rng, _length(rng, PROMPT_TOKENS), _length(rng, OUTPUT_TOKENS))


def _length(rng: random.Random, between: tuple[int, int]) -> int:
    low, high = between
    return round(low * (high / low) ** rng.random())


def _processor_seconds() -> tuple[float, float]:
    """Return how much processor time everybody has used so far, and we and our children.

    (0, 0) where there is no /proc.
    """
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0, 0.0
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _waiting, *interrupts = map(int, first[1:9])
    everybody = user + nice + system + sum(interrupts)
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended since
        pid = int(entry.parent.name)
        parents[pid], used[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = sum(used[pid] for pid in used if _is_ours(pid, parents))
    return everybody * tick_s, ours * tick_s


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = parents.get(pid, 0)
    return False
