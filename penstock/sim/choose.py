"""Which workload: a file, or a rule with its numbers, `chat:turns=8,think=5`, as arrivals.

Rules (`KINDS` has their numbers): `fixed` and `lognormal` single requests, `chat` and `agents`
sessions of many turns, `step` a rate that changes once, `swing` a mix whose ratio of input to
output swings, `phases` its two kinds in turns. A file with times keeps their pattern, faster or
slower when a rate is asked for; one without times is drawn from at that rate.

Called by the command line and by benchmarks.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_S
from penstock.sim.traces import read_workload
from penstock.sim.workload import (
    Arrival,
    Rate,
    SessionShape,
    arrival_times,
    constant,
    lognormal,
    phased,
    sessions,
    step,
    swinging,
    synthetic,
)

KINDS: Final[dict[str, dict[str, float]]] = {
    "fixed": {"in": 1000, "out": 256, "shared": 0},
    "lognormal": {"in": 1000, "out": 256, "sigma": 0.8, "shared": 0},
    "chat": {"turns": 5, "in": 600, "out": 250, "think": 20, "system": 500},
    "agents": {"turns": 20, "in": 400, "out": 80, "think": 1, "system": 2000},
    "step": {"in": 1500, "out": 300, "sigma": 0.8, "at": 120, "factor": 3},
    "swing": {"period": 600},
    "phases": {"phase": 120, "busier": 1.8},
}
"""Rules by name, with their numbers and what they are unless said otherwise."""
_NAMES_PER_ROUND: Final = 10_000_000
_DURATION_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What is to arrive.

    `rate` is in requests (or sessions) per second; None keeps a file's own. `cv` is the coefficient
    of variation of drawn gaps: 1 Poisson, more in bursts, 0 evenly. `requests_max` ends it early.
    """

    source: str
    rate: float | None = None
    duration_s: float | None = None
    cv: float = 1.0
    seed: int = 0
    requests_max: int | None = None


def make_workload(spec: WorkloadSpec) -> list[Arrival]:
    """Return the arrivals of a workload in order of time; the same `spec` gives the same.

    Raises: `BadRequest` saying what is wrong with it.
    """
    kind, _, rest = spec.source.partition(":")
    arrivals = _by_rule(spec, kind, rest) if kind in KINDS else _from_file(spec)
    listed = [a for a, _ in zip(arrivals, range(spec.requests_max or 1 << 40), strict=False)]
    if not listed:
        raise BadRequest("the workload has no requests: raise --rate or --duration", "workload")
    return listed


def _by_rule(spec: WorkloadSpec, kind: str, rest: str) -> Iterator[Arrival]:
    numbers = _numbers(kind, rest)
    rng = random.Random(spec.seed)
    rate = spec.rate or 1.0
    duration_s = spec.duration_s or _DURATION_S

    def times(changing: Rate) -> Iterator[float]:
        return arrival_times(random.Random(spec.seed + 1), changing, duration_s, cv=spec.cv)

    def lengths(rng: random.Random) -> tuple[int, int]:
        sigma = numbers.get("sigma", 0.0)
        return lognormal(rng, numbers["in"], sigma), lognormal(rng, numbers["out"], sigma)

    match kind:
        case "fixed" | "lognormal":
            shared = int(numbers["shared"])
            return synthetic(rng, lengths, times(constant(rate)), shared_tokens=shared)
        case "step":
            changing = step(rate, numbers["at"], numbers["factor"])
            return synthetic(rng, lengths, times(changing))
        case "swing":
            return swinging(rng, rate, duration_s, period_s=numbers["period"], cv=spec.cv)
        case "phases":
            phase_s, busier = numbers["phase"], numbers["busier"]
            return phased(rng, rate, duration_s, phase_s=phase_s, busier=busier, cv=spec.cv)
        case _:
            shape = SessionShape(
                turns=numbers["turns"],
                input_tokens=int(numbers["in"]),
                output_tokens=int(numbers["out"]),
                think_s=numbers["think"],
                system_tokens=int(numbers["system"]),
            )
            return sessions(rng, shape, times(constant(rate)))


def _numbers(kind: str, text: str) -> dict[str, float]:
    numbers = dict(KINDS[kind])
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        try:
            numbers[name] = float(value if name in numbers else "unknown")
        except ValueError:
            known = ",".join(f"{k}={v:g}" for k, v in KINDS[kind].items())
            raise BadRequest(f"{kind}: {item!r} is none of {known}", "workload") from None
    return numbers


def _from_file(spec: WorkloadSpec) -> Iterable[Arrival]:
    if not Path(spec.source).is_file():
        known = ", ".join(f"{k}:{','.join(n)}" for k, n in KINDS.items())
        raise BadRequest(f"{spec.source!r} is neither a file nor a rule: {known}", "workload")
    recording = read_workload(spec.source, spec.seed)
    arrivals = recording.arrivals
    if not recording.is_timed:
        return _drawn(spec, arrivals)
    speed = 1.0
    if spec.rate is not None and recording.duration_s:
        speed = spec.rate / (len(arrivals) / recording.duration_s)
    scaled = (replace(a, at_ns=int(a.at_ns / speed)) for a in arrivals)
    if spec.duration_s is None:
        return scaled
    end_ns = int(spec.duration_s * NS_PER_S)
    return takewhile(lambda arrival: arrival.at_ns < end_ns, scaled)


def _drawn(spec: WorkloadSpec, arrivals: list[Arrival]) -> Iterator[Arrival]:
    """Give times to requests without any: all of them once, or again under other names until
    the duration is over.
    """
    if spec.rate is None:
        raise BadRequest(f"{spec.source} has no arrival times: say how many with --rate", "rate")
    duration_s = spec.duration_s or len(arrivals) / spec.rate
    times_s = arrival_times(random.Random(spec.seed), constant(spec.rate), duration_s, cv=spec.cv)
    for i, at_s in enumerate(times_s):
        rounds, index = divmod(i, len(arrivals))
        arrival, shift = arrivals[index], rounds * _NAMES_PER_ROUND
        pieces = tuple((name + shift, size) for name, size in arrival.pieces)
        yield replace(arrival, at_ns=int(at_s * NS_PER_S), pieces=pieces)
