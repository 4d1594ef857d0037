"""What decodes where prompts come in now goes on elsewhere if that pays; no token is lost or turned
round.
"""

import random

import pytest

from penstock.core.config import ControllerConfig
from penstock.core.events import SetRole
from penstock.core.messages import Assign, Cancel, Migrate, Tokens
from penstock.core.request import Request, RequestState, SamplingParams
from penstock.core.types import FRONT, NS_PER_MS, RequestId, Role, WorkerId
from penstock.sim.executor import VOCAB_SIZE, StepCost, expected_tokens
from penstock.sim.network import LinkCost
from penstock.sim.run import ClusterSpec, SimCluster
from tests.control.story import Story

LONG = 3000


def make(*names: str, seats: int = 64, **settings: object) -> Story:
    more = {"is_switching_roles": True, "usual_ttft_ms": 500.0, "admit_backlog_ms": 1e6}
    story = Story(num_blocks=1 << 18, policy="predicted", **(more | settings))
    for name in names:
        story.join(name, max_num_seqs=seats)
    story.said.clear()
    return story


def decoding(story: Story, name: str, max_tokens: int = 500) -> str:
    """Have a request decode; return where."""
    story.submit(name, LONG, max_tokens=max_tokens)
    ((prefill, decode),) = story.pairs()
    story.offered(prefill, name)
    story.tokens(decode, name, 1)
    return decode


def flip(story: Story, worker: str, *, prompts: int = 30) -> list[tuple[str, Migrate]]:
    """Make a prefill worker of one that decodes, let prompts come in, and look."""
    story.pass_time(1000, "roles")
    story.tell(SetRole(worker_id=WorkerId(worker), role=Role.PREFILL, is_pinned=True))
    for number in range(prompts):
        story.submit(f"{story.now_ns}-{number}", LONG, max_tokens=2)
    story.heard(Tokens)
    story.pass_time(1000, "roles")
    return story.heard(Migrate)


def outputs(story: Story) -> list[int]:
    """Return and forget the tokens of `r` that the front end was told."""
    said = [message for to, message in story.heard(Tokens) if to == FRONT]
    mine = [o for message in said for o in message.outputs if o.request_id == "r"]
    return [token for output in mine for token in output.token_ids]


def test_a_decode_leaves_a_worker_that_computes_prompts() -> None:
    story = make("p0", "d0", "d1")
    old = decoding(story, "r")
    new = "d1" if old == "d0" else "d0"
    said = flip(story, old)
    assert said == [(old, Migrate(request_id=RequestId("r"), decode_worker=WorkerId(new)))]
    record = story.controller.requests[RequestId("r")]
    assert record.decode is story.controller.workers[WorkerId(new)]
    assert record.prefill is story.controller.workers[WorkerId(old)]
    story.tokens(old, "r", 2)
    story.tokens(new, "r", 4)
    assert outputs(story) == [2]  # the old one may have said more, which is still on its way
    story.tokens(old, "r", 3)
    story.offered(old, "r")
    assert outputs(story) == [3, 4]
    assert record.state is RequestState.DECODING
    story.tokens(new, "r", 5, is_last=True)
    assert outputs(story) == [5]
    assert story.controller.status().finished == 1


def moving(*names: str) -> tuple[Story, str, str]:
    """Return a story in which `r` was told to go on elsewhere, from where, and to where."""
    story = make(*names)
    old = decoding(story, "r")
    ((_, message),) = flip(story, old)
    return story, old, message.decode_worker


def test_nobody_moves_to_where_it_has_been_and_what_ends_meanwhile_has_ended() -> None:
    story, old, new = moving("p0", "d0", "d1", "d2")
    story.offered(old, "r")
    story.tokens(new, "r", 2)
    ((_, message),) = flip(story, new)
    third = message.decode_worker
    assert third not in (old, new)
    story.offered(new, "r")
    story.tokens(third, "r", 3)
    for worker in (old, new, "p0"):
        story.tell(SetRole(worker_id=WorkerId(worker), role=Role.DECODE, is_pinned=True))
    assert not flip(story, third)
    story.tokens(third, "r", 4, is_last=True)
    story, old, new = moving("p0", "d0", "d1")
    story.tokens(old, "r", 2, is_last=True)
    assert story.controller.status().finished == 1


@pytest.mark.parametrize("why", ["nothing_comes_in", "no_seat", "nearly_over", "its_own_origin"])
def test_what_would_gain_nothing_stays(why: str) -> None:
    story = make(*("p0", "d0") if why == "its_own_origin" else ("p0", "d0", "d1"), seats=2)
    others = [] if why != "no_seat" else ["a", "b", "c", "d"]
    places = [decoding(story, name) for name in others]
    old = decoding(story, "r", max_tokens=2 if why == "nearly_over" else 500)
    if why == "no_seat":
        assert set(places) == {"d0", "d1"}
    if why == "its_own_origin":
        story.tell(SetRole(worker_id=WorkerId("p0"), role=Role.DECODE, is_pinned=True))
    assert not flip(story, old, prompts=0 if why == "nothing_comes_in" else 30)
    assert story.controller.requests[RequestId("r")].state is RequestState.DECODING


@pytest.mark.parametrize("lost", ["old", "new"])
def test_a_loss_on_the_way_begins_anew_with_what_there_is(lost: str) -> None:
    story, old, new = moving("p0", "d0", "d1", "d2")
    story.tokens(old, "r", 2)
    story.lose(old if lost == "old" else new)
    other = new if lost == "old" else old
    assert (other, Cancel(request_id=RequestId("r"))) in story.heard(Cancel)
    again = [m.request for _, m in story.heard(Assign) if m.request.request_id == "r~1"]
    assert [request.output_token_ids for request in again] == [(1, 2)]
    story.tokens(other, "r", 9)
    assert outputs(story) == [2]


def test_a_client_that_leaves_is_forgotten_on_both() -> None:
    story, old, new = moving("p0", "d0", "d1")
    story.tell(Cancel(request_id=RequestId("r")))
    assert {to for to, _ in story.heard(Cancel)} == {old, new}


def run_moving(seed: int) -> tuple[SimCluster, list[Request]]:
    """Run workers that change sides again and again under prompts and answers, with faults."""
    rng = random.Random(seed)
    trouble = rng.choice([{}, {"loss": 0.1, "duplication": 0.1}, {"move_failure": 0.2}])
    spec = ClusterSpec(
        roles={"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "d2": Role.DECODE},
        num_blocks=(60,),
        max_model_len=200,
        step_cost=StepCost(base_ns=2_000_000),
        link_cost=LinkCost(latency_ns=100_000, jitter_ns=rng.choice([0, 4_000_000]), **trouble),
        controller=ControllerConfig(
            policy="predicted", is_switching_roles=True, role_interval_ms=5.0
        ),
    )
    cluster = SimCluster(spec, seed)
    requests = []
    for number in range(30):
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 90))),
            params=SamplingParams(max_tokens=rng.randint(20, 60), seed=number, ignore_eos=True),
        )
        at_ns = rng.randint(0, 300) * NS_PER_MS
        cluster.submit(request, at_ns)
        if rng.random() < 0.1:
            cluster.cancel(request.request_id, at_ns + rng.randint(0, 100) * NS_PER_MS)
        requests.append(request)
    for at_ms in range(30, 400, 30):
        name, role = rng.choice(["d0", "d1", "d2"]), rng.choice([Role.PREFILL, Role.DECODE])
        cluster.set_role(name, role, at_ms * NS_PER_MS)
    if rng.random() < 0.5:
        cluster.kill(rng.choice(["p0", "d0", "d1"]), rng.randint(50, 300) * NS_PER_MS)
    cluster.run()
    return cluster, requests


def test_every_token_is_right_while_decodes_move_about() -> None:
    num_moved = 0
    for seed in range(8):
        cluster, requests = run_moving(seed)
        num_moved += cluster.controller.relocation.num_moved
        for request in requests:
            outcome = cluster.outcomes[request.request_id]
            expected = expected_tokens(request, request.params.max_tokens, ())
            story = f"seed {seed}\n{cluster.story(request.request_id)}"
            is_partial = cluster.is_unwanted(request.request_id) or outcome.error is not None
            length = len(outcome.token_ids) if is_partial else len(expected)
            assert outcome.token_ids == expected[:length], story
        for name, worker in cluster.workers.items():
            assert worker.core.is_idle, (seed, name)
    assert num_moved > 15
