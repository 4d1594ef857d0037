"""A member and its controller, each with a messenger of its own."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.core.errors import WorkersUnavailable
from penstock.core.membership import Leave, Ping
from penstock.core.messages import Message
from penstock.core.types import CONTROLLER, WorkerId
from penstock.runtime.clock import HostTime
from penstock.runtime.heart import Heart, Return
from penstock.runtime.messaging import Messenger
from penstock.runtime.settings import PulseSettings

ME = WorkerId("me")
PULSE = PulseSettings(interval_s=0.02, suspect_after_s=0.2, lost_after_s=0.4, rejoin_timeout_s=1.0)
HELLO = Leave(worker_id=ME, epoch=1)


class Pair:
    """A controller that answers pings when asked to, and a member with a heart."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.heard: list[Message] = []
        self.let_go = 0
        self.controller = Messenger(CONTROLLER, 0, folder, self.heard.append, hears_strangers=True)
        self.member = Messenger(ME, 1, folder, self._take)
        self.controller.open()
        self.member.open()
        self.controller.connect(ME, 1, self.member.address)
        self.member.connect(CONTROLLER, 0, self.controller.address)
        returning = Return(let_go=self._let_go, hello=lambda: HELLO)
        self.heart = Heart(self.member, PULSE, returning=returning, **options)
        self.beating = asyncio.ensure_future(self.heart.beat())

    def _take(self, message: Message) -> None:
        assert isinstance(message, Ping)
        self.heart.hear(message)

    def _let_go(self) -> None:
        self.let_go += 1

    def answer(self, ahead_ns: int = 0) -> None:
        """Say what a controller says whose clock is that much ahead."""
        pings = [message for message in self.heard if isinstance(message, Ping)]
        echo_ns = pings[-1].sent_ns if pings else 0
        now_ns = time.monotonic_ns() + ahead_ns
        ping = Ping(sender=CONTROLLER, epoch=0, sent_ns=now_ns, echo_ns=echo_ns, held_ns=0)
        self.controller.send(ME, ping)

    async def close(self) -> None:
        self.beating.cancel()
        await asyncio.wait([self.beating])
        self.member.close()
        self.controller.close()


def run(story: Callable[[Pair], Awaitable[None]], **options: object) -> None:
    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as folder:
            pair = Pair(Path(folder), **options)
            try:
                async with asyncio.timeout(20):
                    await story(pair)
            finally:
                await pair.close()

    asyncio.run(tell())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_it_says_that_it_is_alive_and_how_long_the_step_has_taken():
    async def story(pair: Pair) -> None:
        await until(lambda: len(pair.heard) >= 3)
        assert {(m.sender, m.epoch, m.step_age_ns) for m in pair.heard} == {(ME, 1, 7)}

    run(story, step_age_ns=lambda: 7)


def test_it_measures_how_far_the_controllers_clock_is_ahead():
    host_time = HostTime()

    async def story(pair: Pair) -> None:
        while len(pair.heard) < 40:
            pair.answer(ahead_ns=3_000_000)
            await asyncio.sleep(0.01)
        assert pair.let_go == 0
        assert 0 < host_time.offset_ns <= 3_000_000 + 20_000_000

    run(story, time=host_time)


def test_a_silent_controller_is_let_go_once_and_looked_for_until_it_is_heard():
    async def story(pair: Pair) -> None:
        await until(lambda: HELLO in pair.heard)
        assert pair.let_go == 1
        count = len(pair.heard)
        while len(pair.heard) <= count + 5:  # its heart beats again
            pair.answer()
            await asyncio.sleep(0.002)
        assert not pair.beating.done()
        assert pair.let_go == 1

    run(story)


def test_a_controller_that_stays_away_is_given_up():
    async def story(pair: Pair) -> None:
        with pytest.raises(WorkersUnavailable, match="--rejoin-timeout"):
            await pair.beating

    run(story)
