"""`Questions`: something asked of several workers at once, and their answers until a deadline.

Owns the open questions, nothing of what is asked. Called on the loop's thread by whoever asks
(`surveys.py`, `local.py`).
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from penstock.core.messages import Message
from penstock.core.types import WorkerId

Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Question(Generic[Answer]):
    waiting: set[WorkerId]
    done: asyncio.Future[None]
    answers: dict[WorkerId, Answer] = field(default_factory=dict)


class Questions(Generic[Answer]):
    """`send` is how a worker is told something."""

    def __init__(self, send: Callable[[WorkerId, Message], None]) -> None:
        self._send = send
        self._open: dict[int, _Question[Answer]] = {}
        self._last = 0

    def take(self, number: int, worker_id: WorkerId, answer: Answer) -> None:
        """Take an answer; one that comes too late is of no use any more."""
        question = self._open.get(number)
        if question is not None and worker_id in question.waiting:
            question.waiting.remove(worker_id)
            question.answers[worker_id] = answer
            if not question.waiting and not question.done.done():
                question.done.set_result(None)

    async def ask(
        self, workers: Iterable[WorkerId], numbered: Callable[[int], Message], timeout_s: float
    ) -> dict[WorkerId, Answer]:
        """Send each the message with its number; return the answers that came in time."""
        waiting = set(workers)
        if not waiting:
            return {}
        self._last += 1
        number, message = self._last, numbered(self._last)
        question = _Question[Answer](waiting, asyncio.get_running_loop().create_future())
        self._open[number] = question
        try:
            for worker in sorted(waiting):
                self._send(worker, message)
            await asyncio.wait([question.done], timeout=timeout_s)
        finally:
            del self._open[number]
        return question.answers
