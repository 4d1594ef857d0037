"""The three ways in which a core touches the world. Production and simulation differ in these and
in nothing else.
"""

from collections.abc import Callable
from typing import Protocol

from penstock.core.events import (
    Command,
    Event,
    Move,
    MoveDone,
    StepDone,
)
from penstock.core.messages import Message
from penstock.core.step import Step
from penstock.core.types import WorkerId


class Core(Protocol):
    """Decides. Deterministic: the same events at the same times give the same commands."""

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in; return what to do about it, in order."""


class Clock(Protocol):
    """Tells the time and rings."""

    def now_ns(self) -> int:
        """Nanoseconds of a clock that never goes back and that all nodes of a host share."""

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        """Call back at or soon after `at_ns`."""


class Executor(Protocol):
    """Runs model steps, one at a time, in the order given."""

    def run(self, step: Step, done: Callable[[StepDone], None]) -> None:
        """Start the step and return; `done` is called once, on the node's own thread, or where
        rounds are reported one by one, once for each.
        """

    def end(self, step_id: int) -> None:
        """Begin no more rounds of that step, if it is under way."""


class Transport(Protocol):
    """Sends messages and moves blocks."""

    def send(self, to: WorkerId, message: Message) -> None:
        """Queue a message; ordered per destination. A destination that is gone swallows it."""

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Start the move and return; `done` is called once, on the node's own thread."""
