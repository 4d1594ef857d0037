"""`LaneTransport`: the transport port of a worker: messages by `Messenger`, moves on a thread of
their own.
"""

from collections.abc import Callable

from penstock.core.events import Move, MoveDone
from penstock.core.messages import Message
from penstock.core.types import WorkerId
from penstock.runtime.lane import Lane
from penstock.runtime.messaging import Messenger


class LaneTransport:
    """Copies run beside model steps: a copy is memory traffic and needs no interpreter."""

    def __init__(self, messenger: Messenger, move: Callable[[Move], MoveDone]) -> None:
        self._messenger = messenger
        self._move = move
        self._lane: Lane[MoveDone] = Lane("moves", on_crash=_fail)

    def start(self) -> None:
        """Start the thread."""
        self._lane.start()

    def send(self, to: WorkerId, message: Message) -> None:
        """Queue a message."""
        self._messenger.send(to, message)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Queue the move; moves run one after the other, in the order given."""
        self._lane.do(lambda: self._move(move), done)


def _fail(error: BaseException) -> None:
    """A peer that is gone is an answer, not an exception: this one is a bug."""
    raise error
