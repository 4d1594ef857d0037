"""The fabric: what a move costs between hosts, within one, and within a worker."""

import pytest
from msgspec.structs import replace

from penstock.core.events import Move, MoveClass, MoveDone, Span
from penstock.core.messages import TokenOutput, Tokens
from penstock.core.request import Timeline
from penstock.core.types import CONTROLLER, BlockId, RequestId, WorkerId
from penstock.sim.clock import SimClock
from penstock.sim.fabric import FIRST_TOKENS, Fabric, FabricCost, MessageTimes

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
COST = FabricCost(latency_ns=1000, span_ns=100, card_bytes_per_s=1e9, inner_bytes_per_s=10e9)


def move(source: WorkerId, num_spans: int = 1, epoch: int = 1) -> Move:
    spans = tuple(Span(BlockId(9 * i), BlockId(9 * i), 5) for i in range(num_spans))
    return Move(
        move_id=1,
        kind=MoveClass.HANDOFF,
        request_id=RequestId("r"),
        source=source,
        epoch=epoch,
        spans=(spans,),
    )


def carry(asked: Move, *, leaves: bool = False) -> tuple[MoveDone, Fabric]:
    clock, done = SimClock(), []
    fabric = Fabric(clock, COST, {A: 0, B: 0, C: 1})
    for name in (A, B, C):
        fabric.join(name, 1, lambda _: None)
    fabric.submit(A, (1000,), asked, done.append)
    if leaves:
        fabric.leave(asked.source)
    assert clock.run(until_ns=10**12)
    return done[0], fabric


@pytest.mark.parametrize(("source", "bytes_per_ns"), [(C, 1.0), (B, 10.0), (A, 1000.0)])
def test_a_move_takes_latency_spans_and_bytes(source: WorkerId, bytes_per_ns: float) -> None:
    done, _ = carry(move(source, num_spans=3))
    assert (done.num_spans, done.num_bytes, done.error) == (3, 15_000, None)
    expected_ns = 1000 + 300 + 15_000 / bytes_per_ns
    assert done.finished_ns == pytest.approx(expected_ns, abs=2)


def test_what_stays_in_a_worker_uses_no_link() -> None:
    assert not any(carry(move(A))[1].links.bytes_carried.values())
    carried = carry(move(C))[1].links.bytes_carried
    assert (carried["out", 1], carried["in", 0], carried["inner", 0]) == (5000, 5000, 0)


def test_a_source_that_is_gone_or_another_fails_the_move() -> None:
    assert carry(move(C), leaves=True)[0].error == "c is gone"
    assert carry(move(C, epoch=2))[0].error == "c is gone"


def test_what_is_written_goes_the_other_way_and_asks_for_the_one_it_is_written_to() -> None:
    written = replace(move(A), destination=C)
    done, fabric = carry(written)
    carried = fabric.links.bytes_carried
    assert (carried["out", 0], carried["in", 1], carried["out", 1]) == (5000, 5000, 0)
    assert done.error is None
    assert carry(replace(written, epoch=2))[0].error == "c is gone"


def test_comparing_what_is_here_asks_nobody() -> None:
    done, fabric = carry(replace(move(C, epoch=2), kind=MoveClass.VERIFY))
    assert done.error is None
    assert not any(fabric.links.bytes_carried.values())


def test_first_tokens_take_the_time_of_first_tokens() -> None:
    clock, heard = SimClock(), []
    times = MessageTimes({"Tokens": (300,), FIRST_TOKENS: (900,)})
    fabric = Fabric(clock, FabricCost(messages=times), {})
    fabric.join(CONTROLLER, 0, lambda _: heard.append(clock.now_ns()))
    for at_ns, timeline in ((0, Timeline(arrived_ns=1)), (2000, None)):
        output = TokenOutput(RequestId("r"), (5,), timeline=timeline)
        said = Tokens(worker_id=A, outputs=(output,))
        clock.call_at(at_ns, lambda said=said: fabric.send(CONTROLLER, said, A))
    assert clock.run(until_ns=10**6)
    assert heard == [900, 2300]
