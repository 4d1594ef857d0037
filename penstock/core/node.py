"""`Node` drives one core over the three ports, and `DecisionLog` remembers what it decided.

The node is the only place where a command turns into an act. It runs on one thread; ports call back
on that thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import assert_never

import msgspec
import numpy as np

from penstock.core.events import (
    Command,
    EndStep,
    Event,
    RunStep,
    Send,
    SubmitMove,
    WakeAt,
    Woken,
)
from penstock.core.ports import Clock, Core, Executor, Transport


class Node:
    """Feeds events to a core, one at a time, and carries out what it commands.

    A port may deliver from inside a command (a simulated executor that answers at once): such
    events wait until the current one is done, so a core never sees itself re-entered.
    """

    def __init__(
        self,
        core: Core,
        *,
        clock: Clock,
        transport: Transport,
        executor: Executor | None = None,
        log: "DecisionLog | None" = None,
    ) -> None:
        self.core = core
        self.log = log
        self._clock = clock
        self._transport = transport
        self._executor = executor
        self._inbox: deque[Event] = deque()
        self._is_busy = False

    def deliver(self, event: Event) -> None:
        """Handle `event` now, or right after the one being handled."""
        self._inbox.append(event)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._inbox:
                self._handle(self._inbox.popleft())
        finally:
            self._is_busy = False

    def _handle(self, event: Event) -> None:
        now_ns = self._clock.now_ns()
        commands = self.core.handle(event, now_ns)
        if self.log is not None:
            self.log.record(now_ns, event, commands)
        for command in commands:
            self._act(command)

    def _act(self, command: Command) -> None:
        match command:
            case Send(to, message):
                self._transport.send(to, message)
            case RunStep(step):
                assert self._executor is not None, "a core without an executor gave a step"
                self._executor.run(step, self.deliver)
            case EndStep(step_id):
                assert self._executor is not None, "a core without an executor ended a step"
                self._executor.end(step_id)
            case SubmitMove(move):
                self._transport.submit(move, self.deliver)
            case WakeAt(at_ns, key):
                self._clock.call_at(at_ns, lambda: self.deliver(Woken(key)))
            case _:
                assert_never(command)


class LogEntry(msgspec.Struct, frozen=True):
    """One event, when it was handled, and the commands it led to, all as builtin types."""

    now_ns: int
    event: object
    commands: tuple[object, ...]


class DecisionLog:
    """The last `limit` decisions of one core; every entry also goes to `sink` as one JSON line, if
    given.

    With the events and their times a run can be replayed exactly: a core is a function of them.
    """

    def __init__(self, limit: int = 10_000, sink: Callable[[bytes], None] | None = None) -> None:
        self._entries: deque[LogEntry] = deque(maxlen=limit)
        self._sink = sink

    def record(self, now_ns: int, event: Event, commands: list[Command]) -> None:
        """Keep one decision."""
        entry = self.entry(now_ns, event, commands)
        self._entries.append(entry)
        if self._sink is not None:
            self._sink(msgspec.json.encode(entry) + b"\n")

    @staticmethod
    def entry(now_ns: int, event: Event, commands: Iterable[Command]) -> LogEntry:
        """Return a decision as it is kept."""
        return LogEntry(now_ns, to_builtins(event), tuple(map(_command_to_builtins, commands)))

    def __iter__(self) -> Iterator[LogEntry]:
        return iter(self._entries)

    def story(self, key: str) -> list[str]:
        """Return everything that happened to one request or worker, a line per decision."""
        lines = []
        for entry in self._entries:
            line = msgspec.json.encode(entry).decode()
            if f'"{key}"' in line:
                lines.append(line)
        return lines

    def decisions(self) -> list[object]:
        """Return the commands alone with every time stamp left out: what two runs at different
        speeds share.
        """
        return [_timeless(command) for entry in self._entries for command in entry.commands]


def replay(log: Iterable[LogEntry], core: Core) -> Iterator[tuple[LogEntry, LogEntry]]:
    """Feed a log's events to a fresh core at their recorded times.

    Yields each recorded entry beside what the core does now; equal, unless the code or the core's
    configuration has changed.
    """
    again = DecisionLog(limit=1)
    for entry in log:
        event: Event = msgspec.convert(entry.event, Event, str_keys=True)
        again.record(entry.now_ns, event, core.handle(event, entry.now_ns))
        yield entry, next(iter(again))


def to_builtins(value: object) -> object:
    """Return `value` as dicts, lists, strings and numbers; arrays become lists and dataclasses
    dicts.
    """
    return msgspec.to_builtins(value, enc_hook=_array_to_list, str_keys=True)


def _command_to_builtins(command: Command) -> object:
    if not isinstance(command, RunStep):
        return to_builtins(command)
    # A sample refers to its whole sequence, which the log would repeat at every token.
    samples = [(sample.row, sample.position) for sample in command.step.samples]
    step = msgspec.structs.replace(command.step, samples=())
    return {"type": "RunStep", "step": to_builtins(step), "samples": samples}


def _array_to_list(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError(f"a {type(value).__name__} has no place in an event")


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not str(k).endswith("_ns")}
    if isinstance(value, list | tuple):
        return [_timeless(item) for item in value]
    return value
