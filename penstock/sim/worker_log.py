"""`read_worker_logs`: what a run took in the eyes of its cores, from all its decision logs.

A core lives from event to event. A step lasts for it from the event in which it commanded the step
to the one that says it is over: that is the model, and also the thread that runs it, the loop that
hears of its end, and the waiting for a processor. The same holds for a pull, and a message is under
way from the event in which one core says it to the event that it is for the other. The simulator
takes all three from here, so nothing between them is left to be guessed.

Steps depend on what else the machine does: each knows whether another worker of the run was in a
step when it began. Called by `penstock/sim/calibrate.py`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.core.errors import BadRequest
from penstock.core.messages import TokenOutput, Tokens
from penstock.core.node import LogEntry
from penstock.core.types import FRONT, WorkerId
from penstock.sim.fabric import FIRST_TOKENS
from penstock.sim.profile import Batches

Between = tuple[int, int]
"""From and until when, in nanoseconds of the clock that all processes of a host share."""
_Struct = dict[str, Any]
_WANTED: Final = frozenset({"StepDone", "MoveDone"})


@dataclass(slots=True)
class TakenStep:
    """A step as its core saw it: what it had to do, as `StepSample` counts it, and when."""

    prefill_tokens: int
    prefill_work: int
    decodes: int
    context_tokens: int
    begun_ns: int
    ended_ns: int = 0
    is_crowded: bool = False
    """Whether another worker was in a step when this one began."""
    has_newcomer: bool = False
    """Whether it decodes nothing but, and a sequence among them that the step before did not."""

    @property
    def duration_ns(self) -> int:
        """How long the core waited for it."""
        return self.ended_ns - self.begun_ns


@dataclass(frozen=True, slots=True)
class TakenPull:
    """A pull as its core saw it. `is_shared`: another one was under way for part of the time."""

    num_bytes: int
    num_spans: int
    duration_ns: int
    is_shared: bool = False


@dataclass(slots=True)
class Taken:
    """What was taken: steps by worker, pulls, and messages on their way by the kind of message."""

    steps: dict[WorkerId, list[TakenStep]] = field(default_factory=dict)
    pulls: list[TakenPull] = field(default_factory=list)
    messages_ns: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: "Taken") -> None:
        """Take in what was seen at another time."""
        for name, steps in other.steps.items():
            self.steps.setdefault(name, []).extend(steps)
        self.pulls += other.pulls
        for kind, times_ns in other.messages_ns.items():
            self.messages_ns.setdefault(kind, []).extend(times_ns)


def read_worker_logs(path: str, between: Between | None = None) -> Taken:
    """Read the controller's log at `path` and its workers' beside it (`path`.WORKER.EPOCH).

    Only what began in `between` is taken.

    Raises: `BadRequest` when a log cannot be read, or there is none of a worker.
    """
    reader = _Reader(between)
    logs = worker_logs(path)
    if not logs:
        raise BadRequest(f"{path} has no worker's log beside it, such as {path}.prefill-0.1")
    reader.read(WorkerId(""), Path(path))
    for log in logs:
        name_and_epoch = log.name.removeprefix(Path(path).name + ".")
        reader.read(WorkerId(name_and_epoch.rpartition(".")[0]), log)
    return reader.taken()


def worker_logs(path: str) -> list[Path]:
    """Return the logs of workers beside the controller's at `path`, by name and incarnation."""
    return sorted(Path(path).parent.glob(escape(Path(path).name) + ".*.*"))


class _Reader:
    """Goes through the logs one after the other; the messages are matched when all are read."""

    def __init__(self, between: Between | None) -> None:
        self._between = between
        self._taken = Taken()
        self._said: dict[bytes, deque[int]] = {}
        self._heard: list[tuple[str, bytes, int]] = []

    def read(self, name: WorkerId, log: Path) -> None:
        """Read one log; "" is the controller."""
        step: TakenStep | None = None
        batches = Batches()
        pulls: dict[int, int] = {}
        shared: set[int] = set()
        for entry in _entries(log):
            event: _Struct = msgspec.convert(entry.event, dict[str, Any])
            kind, now_ns = event["type"], entry.now_ns
            if kind == "StepDone" and step is not None:
                step.ended_ns = now_ns
                if self._is_wanted(step.begun_ns):
                    self._taken.steps.setdefault(name, []).append(step)
                # Logs from before there were rounds do not say so.
                step = _following(step) if event.get("goes_on") else step
            elif kind == "MoveDone" and event["move_id"] in pulls:
                begun_ns = pulls.pop(event["move_id"])
                if self._is_wanted(begun_ns):
                    self._note_pull(event, now_ns - begun_ns, is_shared=event["move_id"] in shared)
            elif kind not in _WANTED:
                self._heard.append((_kind(event), _identity(event), now_ns))
            for command in msgspec.convert(entry.commands, list[dict[str, Any]]):
                if command["type"] == "RunStep":
                    step = _step(command["step"], batches, now_ns)
                elif command["type"] == "SubmitMove":
                    pulls[command["move"]["move_id"]] = now_ns
                    shared |= pulls.keys() if len(pulls) > 1 else set()
                elif command["type"] == "Send" and command["to"] != FRONT:
                    said = _identity(command["message"])
                    self._said.setdefault(said, deque()).append(now_ns)

    def taken(self) -> Taken:
        """Return everything, once all logs have been read."""
        for kind, heard, now_ns in self._heard:
            said = self._said.get(heard)
            # The same words may be said again; links keep their order.
            if said and said[0] <= now_ns:
                said_ns = said.popleft()
                if self._is_wanted(said_ns):
                    self._taken.messages_ns.setdefault(kind, []).append(now_ns - said_ns)
        _note_crowds(self._taken.steps)
        return self._taken

    def _note_pull(self, event: _Struct, duration_ns: int, *, is_shared: bool) -> None:
        if event["error"] is None and event["num_bytes"]:
            pull = TakenPull(event["num_bytes"], event["num_spans"], duration_ns, is_shared)
            self._taken.pulls.append(pull)

    def _is_wanted(self, at_ns: int) -> bool:
        return self._between is None or self._between[0] <= at_ns < self._between[1]


def _entries(log: Path) -> Iterator[LogEntry]:
    decode = msgspec.json.Decoder(LogEntry).decode
    try:
        with log.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield decode(line)
                except msgspec.DecodeError as error:
                    if not line.endswith(b"\n"):
                        return  # the process was killed while it wrote its last line
                    raise BadRequest(f"{log}:{number} is no decision: {error}") from error
    except OSError as error:
        raise BadRequest(f"{log} cannot be read: {error.strerror}") from error


def _following(step: TakenStep) -> TakenStep:
    """Return the next round of a step that goes on: every sequence has one token more."""
    context_tokens = step.context_tokens + step.decodes
    return replace(step, begun_ns=step.ended_ns, context_tokens=context_tokens, has_newcomer=False)


def _step(step: _Struct, batches: Batches, now_ns: int) -> TakenStep:
    num_new, num_computed = step["num_new"], step["num_computed"]
    has_newcomer = batches.has_newcomer(num_new, num_computed)
    taken = TakenStep(0, 0, 0, 0, now_ns, has_newcomer=has_newcomer)
    for new, computed in zip(num_new, num_computed, strict=True):
        if new == 1:
            taken.decodes += 1
            taken.context_tokens += computed + 1
        else:
            taken.prefill_tokens += new
            taken.prefill_work += new * (new + 2 * computed)
            taken.has_newcomer = False
    return taken


def _kind(message: _Struct) -> str:
    """Return what `kind_of` says of a message, of its entry in a log."""
    kind: str = message["type"]
    is_first = kind == Tokens.__name__ and any(
        msgspec.convert(output, TokenOutput).timeline for output in message["outputs"]
    )
    return FIRST_TOKENS if is_first else kind


def _identity(message: _Struct) -> bytes:
    """Return what is the same of a message where it is said and where it is heard: timelines are
    stamped before the log has them.
    """
    if "outputs" in message:
        kept: Any = [output[:2] for output in message["outputs"]]
    else:
        kept = {key: value for key, value in message.items() if key != "timeline"}
    return msgspec.json.encode((message["type"], kept))


def _note_crowds(steps: dict[WorkerId, list[TakenStep]]) -> None:
    """Note which steps began while another worker was in one. O(steps x workers)."""
    for name, own in steps.items():
        for other in (other for key, other in steps.items() if key != name):
            at = 0
            for step in own:
                while at < len(other) and other[at].ended_ns <= step.begun_ns:
                    at += 1
                if at < len(other) and other[at].begun_ns <= step.begun_ns:
                    step.is_crowded = True
