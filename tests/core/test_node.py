"""The node carries out what a core says, in order, and its log remembers."""

from collections.abc import Callable

import msgspec
import numpy as np

from penstock.core.events import (
    Command,
    Event,
    Move,
    MoveDone,
    RunStep,
    Send,
    StepDone,
    WakeAt,
    Woken,
)
from penstock.core.messages import Cancel, Message
from penstock.core.node import DecisionLog, Node
from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.core.types import CONTROLLER, RequestId, WorkerId


class Ports:
    """All three ports; steps are answered from inside `run`, the worst case."""

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.now = 0

    def now_ns(self) -> int:
        self.now += 1
        return self.now

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        self.acts.append(f"wake at {at_ns}")
        callback()

    def send(self, to: WorkerId, message: Message) -> None:
        self.acts.append(f"{type(message).__name__} to {to}")

    def run(self, step: Step, done: Callable[[StepDone], None]) -> None:
        self.acts.append(f"step {step.step_id}")
        done(StepDone(step_id=step.step_id, sampled=(), started_ns=0, finished_ns=0))

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        raise AssertionError("no move was asked for")


class Script:
    """A core that answers the events it expects."""

    def __init__(self) -> None:
        self.is_inside = False
        self.events: list[Event] = []

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        assert not self.is_inside
        self.events.append(event)
        match event:
            case Cancel(request_id=request_id):
                cancel = Cancel(request_id=request_id)
                return [RunStep(make_step()), Send(CONTROLLER, cancel), WakeAt(9, "k")]
            case _:
                return []


def make_step() -> Step:
    ids = np.array([3], dtype=np.int64)
    one = np.array([1], dtype=np.int32)
    sample = SampleRow(0, SamplingParams(seed=1), 1, 1, [3] * 10_000)
    return Step(1, ids, one, one, (np.zeros((1, 1), dtype=np.int32),), (sample,))


def test_commands_are_carried_out_in_order_before_the_next_event() -> None:
    ports, core = Ports(), Script()
    log = DecisionLog()
    node = Node(core, clock=ports, transport=ports, executor=ports, log=log)
    node.deliver(Cancel(request_id=RequestId("r")))
    assert ports.acts == ["step 1", "Cancel to controller", "wake at 9"]
    assert [type(e) for e in core.events] == [Cancel, StepDone, Woken]
    assert [entry.now_ns for entry in log] == [1, 2, 3]


def test_the_log_is_json_tells_stories_and_stays_small() -> None:
    lines: list[bytes] = []
    log = DecisionLog(limit=2, sink=lines.append)
    for name in ("a", "b", "c"):
        event = Cancel(request_id=RequestId(name))
        log.record(1, event, [RunStep(make_step()), WakeAt(5, "k")])
    assert len(list(log)) == 2
    assert len(lines) == 3
    assert msgspec.json.decode(lines[0])["event"]["request_id"] == "a"
    assert len(lines[0]) < 1000  # a sample's whole sequence is not in it
    assert len(log.story("b")) == 1
    assert not log.story("a")


def test_decisions_leave_times_out() -> None:
    logs = [DecisionLog(), DecisionLog()]
    for now_ns, log in enumerate(logs):
        log.record(now_ns, Woken("k"), [WakeAt(now_ns, "k")])
    assert logs[0].decisions() == logs[1].decisions() == [{"type": "WakeAt", "key": "k"}]
