"""Messages between nodes of one process, over real sockets."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from penstock.core.errors import StartupFailed
from penstock.core.messages import (
    Cancel,
    Load,
    Message,
    Stop,
    TokenOutput,
    Tokens,
)
from penstock.core.request import Timeline
from penstock.core.types import RequestId, WorkerId
from penstock.runtime.messaging import Messenger

A, B = WorkerId("a"), WorkerId("b")


@pytest.fixture
def folder():
    # A short path: pytest's own folders are longer than a Unix socket's name may be.
    with tempfile.TemporaryDirectory(prefix="pt-") as path:
        yield Path(path)


class Node:
    """A messenger and what it heard."""

    def __init__(self, name: WorkerId, folder: Path, epoch: int = 1, **options) -> None:
        self.heard: list[Message] = []
        self.messenger = Messenger(name, epoch, folder, self.heard.append, **options)
        self.messenger.open()

    def meet(self, other: "Node") -> None:
        peer = other.messenger
        self.messenger.connect(peer.name, peer.epoch, peer.address)


@asynccontextmanager
async def closing(*nodes: Node) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for node in nodes:
            node.messenger.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def cancel(number: int) -> Cancel:
    return Cancel(request_id=RequestId(str(number)))


def test_messages_arrive_in_order_both_ways(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder), Node(B, folder)
        a.meet(b)
        b.meet(a)
        async with closing(a, b):
            for number in range(2000):
                a.messenger.send(B, cancel(number))
                b.messenger.send(A, cancel(-number))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(a.heard) == len(b.heard) == 2000)
            assert b.heard == [cancel(number) for number in range(2000)]
            assert a.heard == [cancel(-number) for number in range(2000)]

    asyncio.run(run())


def test_a_message_may_change_after_it_was_sent(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder), Node(B, folder, hears_strangers=True)
        a.meet(b)
        timeline = Timeline(prompt_tokens=1)
        async with closing(a, b):
            output = TokenOutput(RequestId("r"), (1,), (), None, timeline)
            a.messenger.send(B, Tokens(worker_id=A, outputs=(output,)))
            timeline.prompt_tokens = 2
            await until(lambda: len(b.heard) == 1)
            assert b.heard[0].outputs[0].timeline == Timeline(prompt_tokens=1)

    asyncio.run(run())


def test_a_large_message_and_many_small_ones_behind_it(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder), Node(B, folder, hears_strangers=True)
        a.meet(b)
        blocks = tuple(range(300_000))
        load = Load(
            worker_id=A, waiting=0, running=0, handing_off=0, free_blocks=blocks, cached_blocks=()
        )
        async with closing(a, b):
            a.messenger.send(B, load)
            for number in range(1000):
                a.messenger.send(B, cancel(number))
            await until(lambda: len(b.heard) == 1001)
            assert b.heard[0].free_blocks == blocks
            assert b.heard[-1] == cancel(999)

    asyncio.run(run())


def test_an_unknown_peer_swallows_messages(folder: Path):
    async def run() -> None:
        a = Node(A, folder)
        async with closing(a):
            a.messenger.send(B, Stop())
            assert a.messenger.num_dropped == 1

    asyncio.run(run())


def test_a_dead_peer_swallows_messages_and_its_link_is_cut(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder, high_water_mark=10), Node(B, folder, hears_strangers=True)
        a.meet(b)
        async with closing(a):
            a.messenger.send(B, Stop())
            await until(lambda: len(b.heard) == 1)
            b.messenger.close()
            for number in range(200):
                a.messenger.send(B, cancel(number))
                await asyncio.sleep(0.001)
            assert a.messenger.num_dropped > 100

    asyncio.run(run())


def test_a_peer_that_does_not_read_costs_bounded_memory(folder: Path):
    async def run() -> None:
        a = Node(A, folder, high_water_mark=5)
        context = zmq.Context()
        deaf = context.socket(zmq.PULL)
        deaf.set_hwm(5)
        deaf.bind(f"ipc://{folder}/deaf")
        a.messenger.connect(B, 1, f"ipc://{folder}/deaf")
        load = Load(
            worker_id=A,
            waiting=0,
            running=0,
            handing_off=0,
            free_blocks=tuple(range(30_000)),
            cached_blocks=(),
        )
        async with closing(a):
            for _ in range(200):
                a.messenger.send(B, load)
                await asyncio.sleep(0.001)
            assert a.messenger.num_dropped > 100
        context.destroy(0)

    asyncio.run(run())


def test_junk_is_counted_and_dropped(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder), Node(B, folder, hears_strangers=True)
        a.meet(b)
        context = zmq.Context()
        stranger = context.socket(zmq.PUSH)
        stranger.connect(b.messenger.address)
        async with closing(a, b):
            stranger.send(b"\xc1 not msgpack")
            stranger.send(b"")
            stranger.send_multipart([b"two", b"frames"])
            stranger.send(b"\x93\xa1a\x01\x91\x81\xa4type\xa7Unknown")
            await until(lambda: b.messenger.num_dropped == 5)
            a.messenger.send(B, Stop())
            await until(lambda: b.heard == [Stop()])
        context.destroy(0)

    asyncio.run(run())


def test_what_a_peer_says_before_its_introduction_waits(folder: Path):
    async def run() -> None:
        a, b = Node(A, folder), Node(B, folder)
        a.meet(b)
        async with closing(a, b):
            a.messenger.send(B, cancel(1))
            a.messenger.send(B, cancel(2))
            await asyncio.sleep(0.05)
            assert b.heard == []
            b.meet(a)
            a.messenger.send(B, cancel(3))
            await until(lambda: len(b.heard) == 3)
            assert b.heard == [cancel(1), cancel(2), cancel(3)]

    asyncio.run(run())


def test_a_dead_incarnation_is_not_heard_and_its_successor_is(folder: Path):
    async def run() -> None:
        b = Node(B, folder, hears_strangers=True)
        first, second = Node(A, folder, epoch=1), Node(A, folder, epoch=2)
        first.meet(b)
        second.meet(b)
        async with closing(first, second, b):
            b.meet(first)
            b.messenger.forget(A, 1)
            first.messenger.send(B, cancel(1))
            second.messenger.send(B, cancel(2))
            await until(lambda: b.messenger.num_dropped == 1 and len(b.heard) == 1)
            assert b.heard == [cancel(2)]
            b.messenger.send(A, cancel(3))
            assert b.messenger.num_dropped == 2
            b.meet(second)
            b.messenger.send(A, cancel(4))
            await asyncio.sleep(0.02)
            assert first.heard == []

    asyncio.run(run())


def test_an_introduction_ends_what_earlier_incarnations_may_say(folder: Path):
    async def run() -> None:
        b = Node(B, folder)
        first, second = Node(A, folder, epoch=1), Node(A, folder, epoch=2)
        first.meet(b)
        second.meet(b)
        async with closing(first, second, b):
            b.meet(second)
            b.meet(first)
            first.messenger.send(B, cancel(1))
            second.messenger.send(B, cancel(2))
            await until(lambda: b.messenger.num_dropped == 1 and len(b.heard) == 1)
            assert b.heard == [cancel(2)]

    asyncio.run(run())


def test_reading_goes_on_after_a_callback_raised(folder: Path):
    async def run() -> None:
        heard: list[Message] = []
        errors: list[object] = []

        def deliver(message: Message) -> None:
            heard.append(message)
            if message == cancel(0):
                raise AssertionError("a bug")

        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        a = Node(A, folder)
        b = Messenger(B, 1, folder, deliver, hears_strangers=True)
        b.open()
        a.messenger.connect(B, 1, b.address)
        async with closing(a):
            for number in range(3):
                a.messenger.send(B, cancel(number))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await until(lambda: cancel(2) in heard)
            assert len(errors) == 1
            b.close()

    asyncio.run(run())


def test_a_path_too_long_is_refused_with_advice(folder: Path):
    async def run() -> None:
        messenger = Messenger(A, 1, folder / ("x" * 120), lambda message: None)
        with pytest.raises(StartupFailed, match="TMPDIR"):
            messenger.open()

    asyncio.run(run())


def test_closing_ends_although_zeromq_does_not(folder: Path, monkeypatch, caplog):
    monkeypatch.setattr("penstock.runtime.messaging.END_S", 0.1)

    async def story() -> zmq.Socket[bytes]:
        node = Node("a", folder)
        async with closing(node):
            return node.messenger._context.socket(zmq.PUSH)  # keeps its context from its end

    forgotten = asyncio.run(story())
    assert "left to the end of the process" in caplog.text
    forgotten.close(0)
