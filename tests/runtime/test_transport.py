"""Moves beside the event loop: in order from one peer, side by side from several."""

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from penstock.core.events import Move, MoveClass, MoveDone
from penstock.core.types import RequestId, WorkerId
from penstock.runtime.messaging import Messenger
from penstock.runtime.transport import LaneTransport

SILENT, GOOD = WorkerId("silent"), WorkerId("good")


def move(number: int, source: WorkerId) -> Move:
    request_id = RequestId(f"r{number}")
    return Move(
        move_id=number,
        kind=MoveClass.HANDOFF,
        request_id=request_id,
        source=source,
        epoch=1,
        spans=((),),
    )


def test_a_peer_that_says_nothing_holds_up_its_own_moves_alone():
    released, asked, ended = threading.Event(), [], []
    others = move_threads()

    def carry_out(move: Move) -> MoveDone:
        asked.append(move.move_id)
        if move.source == SILENT:
            assert released.wait(30)
        return MoveDone(
            move_id=move.move_id,
            num_bytes=0,
            num_spans=0,
            transport="none",
            started_ns=0,
            finished_ns=0,
        )

    async def story(messenger: Messenger) -> None:
        transport = LaneTransport(messenger, carry_out)
        for number in range(6):
            transport.submit(
                move(number, SILENT if number % 2 else GOOD),
                lambda done: ended.append(done.move_id),
            )
        # The silent peer's thread may start after the other has done all its moves.
        await until(lambda: len(ended) == 3 and 1 in asked)
        assert ended == [0, 2, 4]
        assert [number for number in asked if number % 2] == [1]
        released.set()
        await until(lambda: len(ended) == 6)
        assert ended[3:] == [1, 3, 5]
        assert len(move_threads() - others) == 2
        transport.forget(SILENT)
        await until(lambda: len(move_threads() - others) == 1)
        transport.submit(move(6, GOOD), lambda done: ended.append(done.move_id))
        await until(lambda: len(ended) == 7)
        transport.forget(GOOD)
        await until(lambda: not move_threads() - others)

    run(story)


def move_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "moves"}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def run(story: Callable[[Messenger], Awaitable[None]]) -> None:
    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as folder:
            messenger = Messenger(WorkerId("w"), 1, Path(folder), lambda message: None)
            messenger.open()
            try:
                await story(messenger)
            finally:
                messenger.close()

    asyncio.run(tell())
