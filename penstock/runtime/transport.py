"""`LaneTransport`: the transport port of a worker: messages by `Messenger`, moves on a thread for
each peer that they read.
"""

from collections.abc import Callable

from penstock.core.events import Move, MoveDone
from penstock.core.messages import Message
from penstock.core.types import WorkerId
from penstock.runtime.lane import Lane
from penstock.runtime.messaging import Messenger


class LaneTransport:
    """Copies run beside model steps: a copy is memory traffic and needs no interpreter.

    Those from different peers run beside one another, so that one whose link is silent, which
    takes seconds to find out, holds up nobody else; so do those between two tiers. A thread comes
    with the first move of its kind. `move` is called from several threads.
    """

    def __init__(self, messenger: Messenger, move: Callable[[Move], MoveDone]) -> None:
        self._messenger = messenger
        self._move = move
        self._lanes: dict[tuple[str, ...], Lane[MoveDone]] = {}

    def send(self, to: WorkerId, message: Message) -> None:
        """Queue a message."""
        self._messenger.send(to, message)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Queue the move; those from one peer run one after the other, in the order given."""
        ends = move.tiers
        way = (move.source,) if ends is None else (move.source, ends.source, ends.destination)
        if way not in self._lanes:
            lane = self._lanes[way] = Lane[MoveDone]("moves", on_crash=_fail)
            lane.start()
        self._lanes[way].do(lambda: self._move(move), done)

    def forget(self, peer: WorkerId) -> None:
        """Let the thread of a peer that is gone end, when it has done what it was asked."""
        for way in [way for way in self._lanes if way[0] == peer]:
            self._lanes.pop(way).finish()


def _fail(error: BaseException) -> None:
    """A peer that is gone is an answer, not an exception: this one is a bug."""
    raise error
