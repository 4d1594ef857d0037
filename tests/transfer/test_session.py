"""One hand-off, every order of events up to a bound, and thousands of random ones beyond.

Two worker cores, a stub of a controller, and a wire on which any message between the two workers
may be delivered in any order, lost or delivered twice; a copy may land, land with a wrong byte, or
fail; the client may leave; time may pass a lease. Whatever happens, in the end nobody hangs, every
block is back, and the request has been answered at most once. So for a prompt that is offered at
once, and for one that is offered chunk by chunk while it is computed.
"""

import random
from copy import deepcopy

import pytest

from penstock.core.config import Handoff, WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import (
    Command,
    Event,
    MoveDone,
    RunStep,
    Send,
    StepDone,
    SubmitMove,
    WakeAt,
    Woken,
)
from penstock.core.messages import Assign, Cancel, Expired, Message, PeerUp, RequestFailed, Tokens
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, Digest, RequestId, Role, WorkerId
from penstock.sim.executor import chain_layout
from penstock.transfer.session import PUSH_SOURCE, SINK, SOURCE, Session, SessionState
from penstock.worker.worker import Worker

NAMES = ("p0", "d0")
LAYOUT = chain_layout(16)
RID = RequestId("r")
Choice = tuple[str, int]


def make_worker(name: str, chunk_tokens: int, handoff: Handoff) -> Worker:
    return Worker(
        WorkerConfig(
            worker_id=WorkerId(name),
            role=Role.MIXED,
            epoch=1,
            layout=LAYOUT,
            num_blocks=(4,),
            max_model_len=64,
            max_num_batched_tokens=chunk_tokens,
            handoff=handoff,
        )
    )


class World:
    """Both workers and everything that is under way. `choices` says what may happen next.

    With `chunk_tokens` below the prompt's 20 tokens it is computed and offered in chunks; then
    when a step of the prefill worker is over is one of the choices.
    """

    def __init__(self, chunk_tokens: int = 64, handoff: Handoff = Handoff.STREAM) -> None:
        self.now_ns = 0
        self.is_chunked = chunk_tokens < 20
        self.workers = {name: make_worker(name, chunk_tokens, handoff) for name in NAMES}
        self.steps: list[tuple[str, Step]] = []
        self.wire: list[tuple[str, Message]] = []
        self.moves: list[tuple[str, SubmitMove]] = []
        self.timers: list[tuple[int, str, str]] = []
        self.num_ends = 0
        self.num_given_back = 0
        self.budget = {"drop": 1, "twice": 1, "corrupt": 2, "fail": 1, "cancel": 1, "time": 2}
        for name in NAMES:
            for other in NAMES:
                info = WorkerInfo(
                    worker_id=WorkerId(other),
                    role=Role.MIXED,
                    epoch=1,
                    address="",
                    pid=0,
                    layout=LAYOUT,
                    num_blocks=(4,),
                    max_model_len=64,
                    max_num_seqs=1,
                )
                self.tell(name, PeerUp(info=info))
        request = Request(
            request_id=RID,
            prompt_token_ids=tuple(range(20)),
            params=SamplingParams(max_tokens=2, seed=1),
        )
        assign = Assign(request=request, decode_worker=WorkerId("d0"), timeline=Timeline())
        self.tell("p0", assign)

    def tell(self, name: str, event: Event) -> None:
        commands = self.workers[name].handle(event, self.now_ns)
        self.workers[name].check()
        for command in commands:
            self.act(name, command)

    def act(self, name: str, command: Command) -> None:
        match command:
            case RunStep(step) if self.is_chunked and name == "p0":
                self.steps.append((name, step))
            case RunStep(step):
                self.step(name, step)  # when it is over makes no difference
            case SubmitMove():
                self.moves.append((name, command))
            case WakeAt(at_ns, key):
                self.timers.append((at_ns, name, key))
            case Send(to, message) if to == CONTROLLER:
                self.hear(message)
            case Send(to, message):
                self.wire.append((to, message))

    def step(self, name: str, step: Step) -> None:
        done = StepDone(
            step_id=step.step_id,
            sampled=tuple(Sampled(5) for _ in step.samples),
            started_ns=0,
            finished_ns=0,
            digests=tuple(tuple(Digest(9) for _ in ids) for ids in step.digests_of),
        )
        self.tell(name, done)

    def hear(self, message: Message) -> None:
        if isinstance(message, Tokens):
            self.num_ends += sum(o.finish_reason is not None for o in message.outputs)
        self.num_given_back += isinstance(message, Expired | RequestFailed)

    def choices(self) -> list[Choice]:
        found: list[Choice] = [("deliver", i) for i in range(len(self.wire))]
        found += [("drop", i) for i in range(len(self.wire)) if self.budget["drop"]]
        found += [("twice", i) for i in range(len(self.wire)) if self.budget["twice"]]
        for kind in ("land", "corrupt", "fail"):
            if self.moves and self.budget.get(kind, 1):
                found.append((kind, 0))
        if self.steps:
            found.append(("step", 0))
        if self.budget["cancel"]:
            found.append(("cancel", 0))
        if self.timers and self.budget["time"]:
            found.append(("time", 0))
        return found

    def do(self, choice: Choice) -> None:
        kind, index = choice
        if kind in self.budget:
            self.budget[kind] -= 1
        match kind:
            case "deliver":
                self.tell(*self.wire.pop(index))
            case "drop":
                self.wire.pop(index)
            case "twice":
                self.tell(*self.wire[index])
            case "cancel":
                for name in NAMES:
                    self.tell(name, Cancel(request_id=RID))
            case "time":
                self.ring()
            case "step":
                self.step(*self.steps.pop(0))
            case _:
                self.land(kind)

    def land(self, kind: str) -> None:
        name, submitted = self.moves.pop(0)
        move = submitted.move
        done = MoveDone(
            move_id=move.move_id,
            num_bytes=1,
            num_spans=1,
            transport="test",
            started_ns=0,
            finished_ns=0,
            error="cut" if kind == "fail" else None,
            is_corrupt=kind == "corrupt",
        )
        self.tell(name, done)

    def ring(self) -> None:
        """Let the time pass to the next timer."""
        self.timers.sort()
        at_ns, name, key = self.timers.pop(0)
        self.now_ns = max(self.now_ns, at_ns)
        self.tell(name, Woken(key))

    def settle(self) -> None:
        """Let everything happen that is still under way, without further misfortune."""
        for _ in range(100):
            if self.wire:
                self.do(("deliver", 0))
            elif self.moves:
                self.land("land")
            elif self.steps:
                self.do(("step", 0))
            elif self.timers:
                self.ring()
            else:
                return
        raise AssertionError("it does not come to an end")

    def check_end(self) -> None:
        assert self.num_ends <= 1, "answered twice"
        was_cancelled = not self.budget["cancel"]
        assert self.num_ends or self.num_given_back or was_cancelled, "lost without a word"
        for name, worker in self.workers.items():
            assert worker.is_idle, name
            load = worker.load()
            assert load.free_blocks[0] + load.cached_blocks[0] == 4, name


def explore(world: World, depth: int, path: list[Choice]) -> int:
    """Take every choice, `depth` times one after the other; return how many ends were checked.

    Others go on in copies of the world that is given, the last one in the world itself.
    """
    choices = world.choices() if depth else []
    if not choices:
        try:
            world.settle()
            world.check_end()
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from error
        return 1
    count = 0
    for number, choice in enumerate(choices, 1):
        following = world if number == len(choices) else deepcopy(world)
        try:
            following.do(choice)
        except AssertionError as error:
            raise AssertionError(f"{[*path, choice]}: {error}") from error
        count += explore(following, depth - 1, [*path, choice])
    return count


WAYS = [(64, Handoff.WHOLE), (16, Handoff.STREAM), (64, Handoff.PUSH), (16, Handoff.PUSH)]


@pytest.mark.parametrize(("chunk_tokens", "handoff"), WAYS)
def test_every_order_of_one_hand_off_up_to_a_bound(chunk_tokens: int, handoff: Handoff) -> None:
    depth = 5 if handoff is Handoff.STREAM else 4
    assert explore(World(chunk_tokens, handoff), depth, []) > 500


@pytest.mark.parametrize(("chunk_tokens", "handoff"), [*WAYS, (7, Handoff.STREAM)])
@pytest.mark.parametrize("block", range(6))
def test_random_orders_beyond_it(chunk_tokens: int, handoff: Handoff, block: int) -> None:
    start = World(chunk_tokens, handoff)
    for seed in range(block * 50, block * 50 + 50):
        rng = random.Random(seed)
        world, path = deepcopy(start), []
        while (choices := world.choices()) and len(path) < 40:
            path.append(rng.choice(choices))
            world.do(path[-1])
        try:
            world.settle()
            world.check_end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {path}: {error}") from error


def test_a_state_that_does_not_follow_is_a_bug() -> None:
    session = Session(RID, WorkerId("p"), SOURCE)
    with pytest.raises(AssertionError):
        session.move_to(SessionState.VERIFIED)
    for table in (SOURCE, SINK, PUSH_SOURCE):
        reachable, todo = set(), [Session(RID, WorkerId("p"), table).state]
        while todo:
            state = todo.pop()
            reachable.add(state)
            todo += [s for s in table.get(state, ()) if s not in reachable]
        assert set(table) <= reachable
        assert SessionState.RELEASED in reachable
