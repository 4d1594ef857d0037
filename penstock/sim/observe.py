"""What is seen of a simulated run: every request's times, and how busy everybody was over time.

Written by `penstock/sim/serve.py`; `penstock/sim/summary.py` makes figures of it and
`penstock/sim/report.py` pictures. Nothing here decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from penstock.core.messages import Load
from penstock.core.request import Timeline
from penstock.core.types import NS_PER_S
from penstock.sim.fabric import Fabric


@dataclass(slots=True)
class Served:
    """One request as its client saw it. Times are 0 where it did not get that far."""

    arrived_ns: int
    input_tokens: int
    output_tokens: int
    first_token_ns: int = 0
    finished_ns: int = 0
    num_tokens: int = 0
    error: str | None = None
    timeline: Timeline | None = None

    def take(self, num_tokens: int, timeline: Timeline | None, now_ns: int) -> None:
        """Note tokens that reached the client."""
        self.num_tokens += num_tokens
        self.first_token_ns = self.first_token_ns or now_ns
        self.timeline = self.timeline or timeline

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token."""
        return (self.first_token_ns - self.arrived_ns) / NS_PER_S

    @property
    def tpot_s(self) -> float:
        """Mean seconds between tokens; 0 for a single one."""
        gaps = max(self.num_tokens - 1, 1)
        return (self.finished_ns - self.first_token_ns) / gaps / NS_PER_S

    @property
    def e2e_s(self) -> float:
        """Seconds from arrival to the last token."""
        return (self.finished_ns - self.arrived_ns) / NS_PER_S


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at one time; `busy_ns` and `prefill_ns` are totals since the start."""

    busy_ns: int
    prefill_ns: int
    waiting: int
    running: int
    held_share: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The cluster at one time."""

    at_ns: int
    num_arrived: int
    num_ended: int
    roles: dict[str, str]
    workers: dict[str, WorkerSample]


class _Stopwatch(Protocol):
    num_steps: int


class _Loaded(Protocol):
    def load(self) -> Load: ...


class _Watched(Protocol):
    @property
    def core(self) -> _Loaded: ...

    @property
    def executor(self) -> _Stopwatch: ...


@dataclass(slots=True)
class Observation:
    """Everything seen of one run."""

    served: list[Served] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    num_ended: int = 0
    unfinished: int = 0
    ended_ns: int = 0
    flips: int = 0
    started: int = 0
    retired: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    num_steps: int = 0
    num_messages: int = 0
    num_events: int = 0
    """What the simulated clock called: a run of decode steps that nothing disturbs is one."""
    bytes_moved: int = 0

    def note(self, sample: Sample) -> None:
        """Keep a sample; count roles that have changed since the one before."""
        if self.samples:
            before = self.samples[-1].roles
            self.flips += sum(before.get(n, role) != role for n, role in sample.roles.items())
        self.samples.append(sample)

    def note_books(self, fabric: Fabric, workers: Iterable[_Watched]) -> None:
        """Add up what the workers and the network counted."""
        self.num_messages = fabric.num_messages
        self.bytes_moved = sum(
            n for link, n in fabric.links.bytes_carried.items() if link[0] != "out"
        )
        for worker in workers:
            load = worker.core.load()
            self.prefix_queries += load.prefix_queries
            self.prefix_hits += load.prefix_hits
            self.preemptions += load.preemptions
            self.num_steps += worker.executor.num_steps
