"""A worker core, told events and asked for what it did: what the tests beside this are made of."""

from msgspec.structs import replace

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import (
    Command,
    Event,
    Move,
    MoveDone,
    RunStep,
    Send,
    StepDone,
    SubmitMove,
    WakeAt,
)
from penstock.core.messages import Assign, Message, Offer, PeerUp, Progress
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.step import Sampled, Step
from penstock.core.types import Digest, RequestId, Role, WorkerId
from penstock.sim.executor import chain_layout
from penstock.worker.worker import Worker

P0, D0 = WorkerId("p0"), WorkerId("d0")
LAYOUT = chain_layout(16)

COPY_NS = 500
"""What every move takes."""


class Story:
    """A worker, and the steps and moves it has under way."""

    def __init__(self, name: WorkerId, num_blocks: int = 16, **settings: int) -> None:
        self.now_ns = 0
        self.steps: list[Step] = []
        self.moves: list[SubmitMove] = []
        self.said: list[Send] = []
        self.asked: list[WakeAt] = []
        config = WorkerConfig(
            worker_id=name,
            role=Role.MIXED,
            epoch=1,
            layout=LAYOUT,
            num_blocks=(num_blocks,),
            max_model_len=200,
            eos_token_ids=(7,),
            **settings,
        )
        self.worker = Worker(config)
        for peer in (P0, D0):
            self.tell(PeerUp(info=info_of(peer)))

    def tell(self, event: Event) -> list[Command]:
        self.now_ns += 1000
        commands = self.worker.handle(event, self.now_ns)
        self.worker.check()
        self.steps += [c.step for c in commands if isinstance(c, RunStep)]
        self.moves += [c for c in commands if isinstance(c, SubmitMove)]
        self.said += [c for c in commands if isinstance(c, Send)]
        self.asked += [c for c in commands if isinstance(c, WakeAt)]
        return commands

    def step(self, token_id: int = 5) -> Step:
        """Finish the step under way; every row that samples gets `token_id`."""
        step = self.steps.pop(0)
        sampled = tuple(Sampled(token_id) for _ in step.samples)
        digests = tuple(tuple(Digest(i + 1) for i in ids) for ids in step.digests_of)
        self.tell(
            StepDone(
                step_id=step.step_id, sampled=sampled, started_ns=0, finished_ns=0, digests=digests
            )
        )
        return step

    def land(
        self, error: str | None = None, *, is_corrupt: bool = False, **changes: object
    ) -> Move:
        """Finish the oldest move under way."""
        move = self.moves.pop(0).move
        done = MoveDone(
            move_id=move.move_id,
            num_bytes=1,
            num_spans=1,
            transport="test",
            started_ns=0,
            finished_ns=COPY_NS,
            error=error,
            is_corrupt=is_corrupt,
        )
        self.tell(replace(done, **changes))
        return move

    def heard(self, kind: type[Message]) -> list[Message]:
        """Return and forget the messages of one kind."""
        found = [send.message for send in self.said if isinstance(send.message, kind)]
        self.said = [send for send in self.said if not isinstance(send.message, kind)]
        return found

    def assert_empty(self) -> None:
        assert self.worker.is_idle
        while self.moves:  # cached blocks may be on their way to a better place
            self.land()
        load = self.worker.load()
        assert load.free_blocks[0] + load.cached_blocks[0] == self.worker.config.num_blocks[0]


def info_of(name: WorkerId) -> WorkerInfo:
    return WorkerInfo(
        worker_id=name,
        role=Role.MIXED,
        epoch=1,
        address="",
        pid=0,
        layout=LAYOUT,
        num_blocks=(16,),
        max_model_len=200,
        max_num_seqs=8,
    )


def request(name: str, num_prompt: int, start: int = 100, **params: int) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(range(start, start + num_prompt)),
        params=SamplingParams(seed=1, **params),
    )


def assign(request: Request, decode_worker: WorkerId) -> Assign:
    return Assign(request=request, decode_worker=decode_worker, timeline=Timeline(arrived_ns=1))


def offer_of(name: str, num_prompt: int, *, accepts_loss: bool = False, **params: int) -> Offer:
    """Have a prefill worker make a real offer."""
    prefill = Story(P0)
    asked = replace(request(name, num_prompt, **params), accepts_loss=accepts_loss)
    prefill.tell(assign(asked, D0))
    while prefill.steps:
        prefill.step()
    (offer,) = prefill.heard(Offer)
    assert isinstance(offer, Offer)
    return offer


def streamed_to_d0(name: str, num_prompt: int, **params: int) -> list[Offer | Progress]:
    """Have a prefill worker make a real offer in chunks of a little more than a block."""
    prefill = Story(P0, max_num_batched_tokens=18)
    prefill.tell(assign(request(name, num_prompt, **params), D0))
    while prefill.steps:
        prefill.step()
    return [*prefill.heard(Offer), *prefill.heard(Progress)]
