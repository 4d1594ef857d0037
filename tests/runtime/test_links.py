"""Workers that try their links: answers, clocks, a peer that says nothing, and one asked twice."""

import asyncio
from dataclasses import dataclass, field

import pytest

from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import DeadlineExceeded
from penstock.core.links import AskTime, LinksTried, TellTime, TryLinks, WayTried
from penstock.core.messages import Message
from penstock.core.types import CONTROLLER, WorkerId
from penstock.runtime import links
from penstock.runtime.links import LinkQuestions, LinkTester
from tests.transport.test_probe import LAYOUT, info

D, P = WorkerId("d"), WorkerId("p")


@dataclass
class Pair:
    """A reader and its peer `p`, whose clock is ahead; messages arrive on the next turn."""

    ahead_ns: int = 5_000_000
    is_deaf: bool = False
    answers: list[LinksTried] = field(default_factory=list)
    probed: list[tuple[str, int]] = field(default_factory=list)
    time_ns: int = 1_000_000_000

    def __post_init__(self) -> None:
        self.reader = LinkTester(D, LAYOUT, self.probe, send=self.send, now_ns=self.now_ns)
        self.peer = LinkTester(
            P, LAYOUT, self.probe, send=self.send, now_ns=lambda: self.now_ns() + self.ahead_ns
        )

    def now_ns(self) -> int:
        self.time_ns += 1000
        return self.time_ns

    def probe(self, peer: WorkerInfo, moved_bytes: int) -> tuple[WayTried, ...]:
        self.probed.append((peer.worker_id, moved_bytes))
        return (WayTried(kind="shm", name="shm", is_used=True),)

    def send(self, to: WorkerId, message: Message) -> None:
        if to == CONTROLLER:
            assert isinstance(message, LinksTried)
            self.answers.append(message)
        elif not (to == P and self.is_deaf):
            assert isinstance(message, AskTime | TellTime)
            end = self.peer if to == P else self.reader
            asyncio.get_running_loop().call_soon(end.hear, message)

    async def answered(self) -> LinksTried:
        async with asyncio.timeout(10):
            while not self.answers:
                await asyncio.sleep(0.001)
        return self.answers.pop()


def test_every_peer_is_tried_and_its_clock_told():
    async def story() -> None:
        pair = Pair()
        pair.reader.add_peer(info())
        pair.reader.hear(TryLinks(number=3, moved_bytes=9))
        tried = await pair.answered()
        assert (tried.number, tried.worker_id, pair.probed) == (3, D, [(P, 9)])
        (link,) = tried.links
        assert (link.owner, link.fingerprint) == (P, tried.fingerprint)
        assert abs((link.skew_ns or 0) - pair.ahead_ns) <= link.skew_within_ns
        assert 0 < link.skew_within_ns < pair.ahead_ns

    asyncio.run(story())


def test_a_peer_that_says_nothing_costs_a_while_and_no_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(links, "TIME_TIMEOUT_S", 0.01)

    async def story() -> None:
        pair = Pair(is_deaf=True)
        pair.reader.add_peer(info())
        pair.reader.hear(TryLinks(number=1))
        (link,) = (await pair.answered()).links
        assert (link.skew_ns, link.skew_within_ns) == (None, 0)
        assert link.ways

    asyncio.run(story())


def test_who_has_gone_is_not_tried_and_a_newer_incarnation_is():
    async def story() -> None:
        pair = Pair()
        pair.reader.add_peer(info())
        pair.reader.forget(P, 6)  # an older one
        pair.reader.hear(TryLinks(number=1))
        pair.reader.hear(TryLinks(number=2))  # asked again meanwhile: once is enough
        assert (await pair.answered()).number == 1
        assert not pair.answers
        pair.reader.forget(P, 7)
        pair.reader.hear(TryLinks(number=3))
        assert (await pair.answered()).links == ()
        assert pair.probed == [(P, links_moved())]

    asyncio.run(story())


def links_moved() -> int:
    return TryLinks(number=0).moved_bytes


def test_the_front_waits_for_the_worker_and_no_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(links, "LINK_TIMEOUT_S", 0.02)

    async def story() -> None:
        sent: list[tuple[WorkerId, Message]] = []
        questions = LinkQuestions(lambda to, message: sent.append((to, message)))
        asking = asyncio.ensure_future(questions.ask(D, 9, 2))
        await asyncio.sleep(0)
        assert sent == [(D, TryLinks(number=1, moved_bytes=9))]
        answer = LinksTried(number=1, worker_id=D, fingerprint="f", links=())
        questions.take(answer)
        assert await asking == answer
        with pytest.raises(DeadlineExceeded, match="d has not answered"):
            await questions.ask(D, 9, 2)
        questions.take(answer)  # comes too late

    asyncio.run(story())
