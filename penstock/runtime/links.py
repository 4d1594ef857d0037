"""What the links between workers are worth: `LinkTester`, a worker's answer to `TryLinks`, and
`LinkQuestions`, which the front asks.

A worker tries every transport to every peer, and compares clocks by messages. Measuring is
`transport/probe.py`'s and runs on a thread; messages come and go on the loop's.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from penstock.core.block import KVLayout
from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import DeadlineExceeded
from penstock.core.links import AskTime, Link, LinksTried, TellTime, TryLinks, WayTried
from penstock.core.messages import Message
from penstock.core.types import CONTROLLER, WorkerId
from penstock.runtime.questions import Questions

TIME_QUESTIONS: Final = 8
"""The exchange that took least is believed."""
TIME_TIMEOUT_S: Final = 1.0
LINK_TIMEOUT_S: Final = 15.0
"""For what a worker tries with one of its peers: a silent one takes a few seconds a transport."""

Probe = Callable[[WorkerInfo, int], tuple[WayTried, ...]]


class LinkTester:
    """`send` is how others are told something, `now_ns` the time as this worker stamps it."""

    def __init__(
        self,
        worker_id: WorkerId,
        layout: KVLayout,
        probe: Probe,
        *,
        send: Callable[[WorkerId, Message], None],
        now_ns: Callable[[], int],
    ) -> None:
        self._worker_id = worker_id
        self._layout = layout
        self._probe = probe
        self._send = send
        self._now_ns = now_ns
        self._peers: dict[WorkerId, WorkerInfo] = {}
        self._waiting: dict[WorkerId, asyncio.Future[tuple[int, int]]] = {}
        self._trying: asyncio.Task[None] | None = None

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""
        self._peers[info.worker_id] = info

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Let go of this incarnation; a newer one is left alone."""
        known = self._peers.get(worker_id)
        if known is not None and known.epoch == epoch:
            del self._peers[worker_id]

    def hear(self, message: TryLinks | AskTime | TellTime) -> None:
        """Take a question or an answer in. What is under way is not asked for a second time."""
        match message:
            case AskTime(worker_id=asker, asked_ns=asked_ns):
                told = TellTime(
                    worker_id=self._worker_id, asked_ns=asked_ns, answered_ns=self._now_ns()
                )
                self._send(asker, told)
            case TellTime(worker_id=peer):
                waiting = self._waiting.get(peer)
                if waiting is not None and not waiting.done():
                    waiting.set_result((message.asked_ns, message.answered_ns))
            case TryLinks():
                if self._trying is None or self._trying.done():
                    self._trying = asyncio.ensure_future(self._answer(message))
                    self._trying.add_done_callback(_raise)

    async def _answer(self, asked: TryLinks) -> None:
        links = [await self._try(info, asked.moved_bytes) for info in [*self._peers.values()]]
        tried = LinksTried(
            number=asked.number,
            worker_id=self._worker_id,
            fingerprint=self._layout.fingerprint(),
            links=tuple(links),
        )
        self._send(CONTROLLER, tried)

    async def _try(self, info: WorkerInfo, moved_bytes: int) -> Link:
        skew = await self._compare_clocks(info.worker_id)
        ways = await asyncio.to_thread(self._probe, info, moved_bytes)
        return Link(
            owner=info.worker_id,
            ways=ways,
            fingerprint=info.layout.fingerprint(),
            incompatibility=self._layout.incompatibility(info.layout) or "",
            skew_ns=skew[1] if skew else None,
            skew_within_ns=skew[0] if skew else 0,
        )

    async def _compare_clocks(self, peer: WorkerId) -> tuple[int, int] | None:
        """Return (round trip, the peer's time less ours) of the quickest exchange, None without."""
        measured = []
        loop = asyncio.get_running_loop()
        for _ in range(TIME_QUESTIONS):
            answer = self._waiting[peer] = loop.create_future()
            self._send(peer, AskTime(worker_id=self._worker_id, asked_ns=self._now_ns()))
            with suppress(TimeoutError):
                asked_ns, answered_ns = await asyncio.wait_for(answer, TIME_TIMEOUT_S)
                now_ns = self._now_ns()
                measured.append((now_ns - asked_ns, answered_ns - (asked_ns + now_ns) // 2))
                continue
            break
        del self._waiting[peer]
        return min(measured, default=None)


class LinkQuestions:
    """`send` is how a worker is told something."""

    def __init__(self, send: Callable[[WorkerId, Message], None]) -> None:
        self._questions = Questions[LinksTried](send)

    def take(self, answer: LinksTried) -> None:
        """Take an answer; one that comes too late is of no use any more."""
        self._questions.take(answer.number, answer.worker_id, answer)

    async def ask(self, worker_id: WorkerId, moved_bytes: int, num_workers: int) -> LinksTried:
        """Return what a worker finds. Raises: `DeadlineExceeded` when it does not answer."""
        timeout_s = LINK_TIMEOUT_S * num_workers
        answers = await self._questions.ask(
            [worker_id],
            lambda number: TryLinks(number=number, moved_bytes=moved_bytes),
            timeout_s,
        )
        if worker_id not in answers:
            raise DeadlineExceeded(f"{worker_id} has not answered within {timeout_s:.0f} s")
        return answers[worker_id]


def _raise(trying: "asyncio.Task[None]") -> None:
    """Let a bug end the worker as any other does."""
    if not trying.cancelled():
        trying.result()
