"""The worker core as stories: events in, expected commands out."""

import numpy as np
import pytest

from penstock.core.config import WorkerConfig
from penstock.core.events import (
    Assign,
    Cancel,
    Command,
    Event,
    Expired,
    Hello,
    Load,
    Message,
    MoveDone,
    Offer,
    Offered,
    PeerDown,
    PeerUp,
    Release,
    Renew,
    RequestFailed,
    RunStep,
    Send,
    StepDone,
    SubmitMove,
    Tokens,
    Withdraw,
    Woken,
    WorkerInfo,
)
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, Digest, FinishReason, RequestId, Role, WorkerId
from penstock.sim.executor import chain_layout
from penstock.worker.worker import Worker

P0, D0 = WorkerId("p0"), WorkerId("d0")
LAYOUT = chain_layout(16)


class Story:
    """A worker, and the steps and moves it has under way."""

    def __init__(self, name: WorkerId, num_blocks: int = 16, **settings: int) -> None:
        self.now_ns = 0
        self.steps: list[Step] = []
        self.moves: list[SubmitMove] = []
        self.said: list[Send] = []
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

    def land(self, error: str | None = None, *, is_corrupt: bool = False) -> None:
        move = self.moves.pop(0).move
        self.tell(
            MoveDone(
                move_id=move.move_id,
                num_bytes=1,
                num_spans=1,
                transport="test",
                started_ns=0,
                finished_ns=0,
                error=error,
                is_corrupt=is_corrupt,
            )
        )

    def heard(self, kind: type[Message]) -> list[Message]:
        """Return and forget the messages of one kind."""
        found = [send.message for send in self.said if isinstance(send.message, kind)]
        self.said = [send for send in self.said if not isinstance(send.message, kind)]
        return found

    def assert_empty(self) -> None:
        assert self.worker.is_idle
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


def offer_of(name: str, num_prompt: int, **params: int) -> Offer:
    """Have a prefill worker make a real offer."""
    prefill = Story(P0)
    prefill.tell(assign(request(name, num_prompt, **params), D0))
    while prefill.steps:
        prefill.step()
    (offer,) = prefill.heard(Offer)
    assert isinstance(offer, Offer)
    return offer


def test_a_worker_alone_prefills_samples_and_finishes() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 20, max_tokens=2), P0))
    step = story.step()
    assert step.num_new.tolist() == [20]
    assert step.samples[0].position == 20
    step = story.step()
    assert (step.num_new.tolist(), step.num_computed.tolist()) == ([1], [20])
    assert step.token_ids.tolist() == [5]
    first, last = story.heard(Tokens)
    assert first.outputs[0].timeline is not None
    assert last.outputs[0].finish_reason is FinishReason.LENGTH
    assert last.outputs[0].timeline is None
    story.assert_empty()


def test_eos_ends_a_request_unless_it_is_to_be_ignored() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=9), P0))
    story.step(token_id=7)
    (tokens,) = story.heard(Tokens)
    assert tokens.outputs[0].finish_reason is FinishReason.STOP
    story.tell(assign(request("s", 4, max_tokens=9, ignore_eos=True), P0))
    story.step(token_id=7)
    (tokens,) = story.heard(Tokens)
    assert tokens.outputs[0].finish_reason is None


def test_a_prefill_worker_computes_all_but_the_last_token_and_never_samples() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    step = story.step()
    assert step.num_new.tolist() == [39]
    assert step.samples == ()
    (offer,) = story.heard(Offer)
    assert offer.num_tokens == 39
    assert len(offer.groups[0].block_ids) == 3
    assert story.heard(Offered)
    assert not story.worker.is_idle  # the blocks stay until they are released
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


def test_a_long_prompt_is_computed_in_chunks_while_others_decode_first() -> None:
    story = Story(P0, max_num_batched_tokens=32)
    story.tell(assign(request("short", 5, max_tokens=9), P0))
    story.step()
    story.tell(assign(request("long", 70, start=500), P0))
    story.step()
    chunks = [story.step().num_new.tolist() for _ in range(3)]
    assert chunks == [[1, 31], [1, 31], [1, 8]]


def test_a_prompt_that_is_cached_is_offered_without_a_step() -> None:
    story = Story(P0)
    for name in ("r", "again"):
        story.tell(assign(request(name, 33), D0))
        if story.steps:
            story.step()
        (offer,) = story.heard(Offer)
        story.tell(Release(request_id=RequestId(name), worker_id=D0))
    assert offer.timeline.cached_tokens == 32
    assert story.worker.load().steps == 1
    story.assert_empty()


def test_an_offer_is_pulled_released_and_continued() -> None:
    story = Story(D0)
    offer = offer_of("r", 40, max_tokens=1)
    story.tell(offer)
    (span,) = story.moves[0].move.spans[0]
    assert span.num_blocks == 3
    assert not story.steps
    story.land()
    (release,) = story.heard(Release)
    assert release.request_id == "r"
    step = story.step()
    assert (step.num_new.tolist(), step.num_computed.tolist()) == ([1], [39])
    (tokens,) = story.heard(Tokens)
    parts = tokens.outputs[0].timeline.ledger(delivered_ns=story.now_ns)
    assert sum(v for k, v in parts.items() if k != "ttft") == pytest.approx(parts["ttft"])
    story.assert_empty()


def test_blocks_that_are_here_already_are_not_pulled_again() -> None:
    story = Story(D0)
    for name in ("r", "again"):
        story.tell(offer_of(name, 40, max_tokens=1))
        sizes = [span.num_blocks for span in story.moves[0].move.spans[0]]
        story.land()
        story.step()
    assert sum(sizes) == 1  # the tail alone: two full blocks were cached by the first


def test_an_offer_waits_for_room_and_then_comes_in() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("first", 40, max_tokens=2))
    story.tell(offer_of("second", 41, max_tokens=1))
    assert len(story.moves) == 1
    story.land()
    story.step()
    story.step()
    assert len(story.moves) == 1
    assert story.worker.load().waiting == 0


def test_what_cannot_be_pulled_is_computed_here() -> None:
    story = Story(D0)
    story.tell(offer_of("r", 40, max_tokens=1))
    story.land(error="link cut")
    assert story.heard(Release)
    assert story.step().num_new.tolist() == [40]
    assert story.heard(Tokens)
    assert story.worker.load().pulls_recomputed == 1
    story.assert_empty()


def test_what_is_corrupt_is_pulled_once_more_and_then_computed_here() -> None:
    for num_corrupt in (1, 2):
        story = Story(D0)
        story.tell(offer_of("r", 40, max_tokens=1))
        for _ in range(num_corrupt):
            story.land(is_corrupt=True)
        if num_corrupt == 1:
            story.land()
        assert len(story.heard(Release)) == 1
        assert story.step().num_new.tolist() == [1 if num_corrupt == 1 else 40]
        load = story.worker.load()
        assert (load.pulls_corrupt, load.pulls_recomputed) == (num_corrupt, num_corrupt - 1)
        story.assert_empty()


def test_offers_carry_a_digest_of_every_block_the_last_one_too() -> None:
    offer = offer_of("r", 40)
    assert len(offer.groups[0].digests) == len(offer.groups[0].block_ids) == 3
    story = Story(D0)
    story.tell(offer)
    assert story.moves[0].move.digests == (offer.groups[0].digests,)


def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.step()
    lease_ns = story.worker.config.lease_ns
    story.now_ns += lease_ns // 2
    story.tell(Renew(request_ids=(RequestId("r"), RequestId("unknown")), worker_id=D0))
    story.now_ns += lease_ns // 2
    story.tell(Woken("lease"))
    assert not story.worker.is_idle
    story.now_ns += lease_ns
    story.tell(Woken("lease"))
    (expired,) = story.heard(Expired)
    assert expired.request_id == "r"
    assert story.worker.load().leases_expired == 1
    story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    story.assert_empty()


def test_leases_are_renewed_while_offers_wait_or_are_pulled_and_no_longer() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("pulled", 40, max_tokens=1))
    story.tell(offer_of("waits", 41, max_tokens=1))
    story.tell(Woken("renew"))
    (renew,) = story.heard(Renew)
    assert set(renew.request_ids) == {"pulled", "waits"}
    story.land()
    story.step()
    story.land()
    story.step()
    story.tell(Woken("renew"))
    assert not story.heard(Renew)
    story.assert_empty()


def test_an_offer_that_comes_twice_or_too_late_is_released_and_not_run_again() -> None:
    story = Story(D0)
    offer = offer_of("r", 40, max_tokens=2)
    story.tell(offer)
    story.tell(offer)
    assert len(story.moves) == 1
    story.land()
    story.heard(Release)
    story.tell(offer)
    assert story.heard(Release)
    story.step()
    story.step()
    story.heard(Tokens)
    story.tell(offer)
    assert story.heard(Release)
    assert not story.steps
    story.assert_empty()


@pytest.mark.parametrize("moment", ["waiting", "in_step", "offered"])
def test_cancel_on_the_prefill_worker(moment: str) -> None:
    story = Story(P0)
    if moment == "waiting":
        story.tell(assign(request("other", 20, max_tokens=1), P0))
    story.tell(assign(request("r", 40, start=500), D0))
    if moment == "offered":
        story.step()
    story.tell(Cancel(request_id=RequestId("r")))
    if moment == "offered":
        assert story.heard(Withdraw)
        assert not story.worker.is_idle  # a read may be under way
        story.tell(Cancel(request_id=RequestId("r")))
        assert not story.heard(Withdraw)  # asked once is enough
        story.tell(Release(request_id=RequestId("r"), worker_id=D0))
    else:
        story.step()
        assert not story.heard(Offer)
    story.assert_empty()


@pytest.mark.parametrize("moment", ["pending", "pulling", "in_step", "unknown"])
@pytest.mark.parametrize("by", ["controller", "prefill_worker"])
def test_cancel_on_the_decode_worker(moment: str, by: str) -> None:
    story = Story(D0, num_blocks=3)
    if moment == "pending":
        story.tell(offer_of("other", 41, max_tokens=1))
    if moment != "unknown":
        story.tell(offer_of("r", 40))
    if moment == "in_step":
        story.land()
        story.heard(Release)
    cancel = (
        Cancel(request_id=RequestId("r"))
        if by == "controller"
        else Withdraw(request_id=RequestId("r"), source=P0)
    )
    story.tell(cancel)
    if moment in ("pending", "pulling"):
        story.land()
    if moment in ("pending", "in_step"):
        story.step()
    released = [r for r in story.heard(Release) if r.request_id == "r"]
    is_owed = moment in ("pending", "pulling") or by == "prefill_worker"
    assert bool(released) == is_owed
    assert not [t for t in story.heard(Tokens) for o in t.outputs if o.request_id == "r"]
    story.assert_empty()


def test_a_dead_decode_worker_frees_what_was_offered_to_it() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 40), D0))
    story.tell(assign(request("late", 40, start=300), D0))
    story.step()
    story.tell(PeerDown(worker_id=D0, epoch=1))
    while story.steps:
        story.step()
    assert [f.request_id for f in story.heard(RequestFailed)] == ["late"] or story.worker.is_idle
    story.assert_empty()


def test_a_dead_prefill_worker_s_offers_are_forgotten_and_its_pulls_finished() -> None:
    story = Story(D0, num_blocks=4)
    story.tell(offer_of("pulled", 40, max_tokens=1))
    late = offer_of("waits", 41)
    story.tell(late)
    story.tell(PeerDown(worker_id=P0, epoch=1))
    story.tell(late)
    assert not story.worker.pulls.pending
    story.land()
    story.step()
    assert story.heard(Tokens)
    story.assert_empty()


def test_the_youngest_is_preempted_and_recomputed() -> None:
    story = Story(P0, num_blocks=4)
    story.tell(assign(request("old", 30, max_tokens=9), P0))
    story.tell(assign(request("young", 31, start=500, max_tokens=9), P0))
    story.step()
    for _ in range(4):
        story.step()
    assert story.worker.load().preemptions == 1
    while story.steps:
        story.step()
    ends = [o for t in story.heard(Tokens) for o in t.outputs if o.finish_reason]
    assert [o.request_id for o in ends] == ["old", "young"]
    story.assert_empty()


def test_penalties_see_the_whole_sequence() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=3, presence_penalty=1), P0))
    story.step(token_id=9)
    sample = story.steps[0].samples[0]
    assert sample.token_ids == [100, 101, 102, 103, 9]
    assert sample.prompt_tokens == 4


def test_load_is_said_when_idle_again() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=1), P0))
    story.heard(Load)
    story.step()
    (load,) = story.heard(Load)
    assert (load.waiting, load.running, load.free_blocks) == (0, 0, (16,))
    assert all(send.to == CONTROLLER for send in story.said)


def test_tables_of_a_step_are_copies() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 20, max_tokens=4), P0))
    before = story.steps[0].block_tables[0].copy()
    story.tell(assign(request("s", 20, start=400, max_tokens=4), P0))
    assert np.array_equal(story.steps[0].block_tables[0], before)


def test_a_hello_is_not_for_workers() -> None:
    story = Story(P0)
    assert story.tell(Hello(info=info_of(D0))) == []
