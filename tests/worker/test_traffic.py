"""Moves of all desks wait for their link; the urgent go first, and what waits can be taken back."""

from penstock.core.config import WorkerConfig
from penstock.core.events import (
    Command,
    Move,
    MoveClass,
    MoveDone,
    Span,
    SubmitMove,
    TierEnds,
)
from penstock.core.tiers import TierConfig
from penstock.core.types import BlockId, RequestId, Role
from penstock.kv.tiers import Tier
from penstock.worker.traffic import Traffic
from tests.worker.story import D0, LAYOUT, P0

BLOCK_BYTES = LAYOUT.block_bytes[0]
UP = (Tier.DRAM, Tier.HBM)
DOWN = (Tier.HBM, Tier.DRAM)
TIERS = (
    TierConfig(name="dram", num_slots=8, bytes_per_s=1_000_000_000),
    TierConfig(name="disk", num_slots=8, bytes_per_s=100_000_000),
)


def traffic() -> Traffic:
    return Traffic(
        WorkerConfig(
            worker_id=P0,
            role=Role.MIXED,
            epoch=1,
            layout=LAYOUT,
            num_blocks=(16,),
            max_model_len=200,
            tiers=TIERS,
        )
    )


def submit(
    move_id: int,
    kind: MoveClass,
    ends: TierEnds | None = None,
    num_blocks: int = 1,
    deadline_ns: int = 0,
) -> SubmitMove:
    return SubmitMove(
        Move(
            move_id=move_id,
            kind=kind,
            request_id=RequestId(""),
            source=D0,
            epoch=1,
            spans=((Span(BlockId(0), BlockId(0), num_blocks),),) if num_blocks else ((),),
            tiers=ends,
        ),
        deadline_ns,
    )


def up(move_id: int, kind: MoveClass = MoveClass.ONBOARD, **more: int) -> SubmitMove:
    return submit(move_id, kind, TierEnds("dram", ""), **more)


def ids(commands: list[Command]) -> list[int]:
    return [c.move.move_id for c in commands if isinstance(c, SubmitMove)]


def land(desk: Traffic, move_id: int, took_ns: int = 1000, error: str | None = None) -> list[int]:
    """End a move; return which begin."""
    desk.land(
        MoveDone(
            move_id=move_id,
            num_bytes=1,
            num_spans=1,
            transport="test",
            started_ns=0,
            finished_ns=took_ns,
            error=error,
        ),
        took_ns,
    )
    desk.check()
    return ids(desk.pass_on([], took_ns))


def test_one_move_at_a_time_on_a_link_and_links_beside_each_other() -> None:
    desk = traffic()
    down = submit(3, MoveClass.OFFLOAD, TierEnds("", "dram"))
    sink = submit(4, MoveClass.OFFLOAD, TierEnds("dram", "disk"))
    assert ids(desk.pass_on([up(1), up(2), down, sink], 0)) == [1, 3, 4]
    assert land(desk, 3) == []
    assert land(desk, 1) == [2]


def test_what_is_urgent_overtakes_and_of_one_class_the_earliest_deadline() -> None:
    desk = traffic()
    wished = [up(i, MoveClass.PREFETCH, deadline_ns=10 - i) for i in (2, 3)]
    assert ids(desk.pass_on([up(1), *wished, up(4)], 0)) == [1]
    assert [land(desk, i) for i in (1, 4, 3)] == [[4], [3], [2]]


def test_what_waits_can_be_promoted_or_taken_back_and_what_moves_cannot() -> None:
    desk = traffic()
    wished = [up(i, MoveClass.PREFETCH, deadline_ns=1000) for i in (2, 3, 4)]
    desk.pass_on([up(1), *wished], 0)
    assert desk.promote(4, MoveClass.ONBOARD, 0)
    assert desk.cancel(2)
    assert not desk.cancel(1)
    assert not desk.promote(1, MoveClass.ONBOARD, 0)
    assert not desk.cancel(2)
    assert [land(desk, i) for i in (1, 4, 3)] == [[4], [3], []]
    books = desk.dma.books(UP)
    assert (books.num_promoted, books.num_cancelled, books.num_transfers) == (1, 1, 3)


def test_a_silent_peer_holds_up_no_other_and_a_relocation_nobody() -> None:
    desk = traffic()
    pulls = [submit(i, MoveClass.HANDOFF) for i in range(5)]
    nothing = submit(6, MoveClass.HANDOFF, num_blocks=0)
    assert ids(desk.pass_on([submit(5, MoveClass.RELOCATE), *pulls, nothing], 0)) == [
        *range(5),
        6,
        5,
    ]


def test_what_a_move_takes_is_learnt_and_what_waits_before_it_counts() -> None:
    desk = traffic()
    alone_ns = desk.predict_ns(UP, MoveClass.ONBOARD, 10 * BLOCK_BYTES)
    desk.pass_on([up(1, num_blocks=10)], 0)
    behind_ns = desk.predict_ns(UP, MoveClass.ONBOARD, 10 * BLOCK_BYTES)
    assert behind_ns > 1.9 * alone_ns
    land(desk, 1, took_ns=1_000_000)
    assert desk.predict_ns(UP, MoveClass.ONBOARD, 10 * BLOCK_BYTES) > alone_ns
    # Nobody learns from what failed.
    before_ns = desk.predict_ns(DOWN, MoveClass.OFFLOAD, 10 * BLOCK_BYTES)
    desk.pass_on([submit(2, MoveClass.OFFLOAD, TierEnds("", "dram"), num_blocks=10)], 0)
    land(desk, 2, took_ns=1_000_000_000, error="full")
    assert desk.predict_ns(DOWN, MoveClass.OFFLOAD, 10 * BLOCK_BYTES) == before_ns
