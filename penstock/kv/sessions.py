"""When conversations go on: learnt from how long they paused before.

A request whose prompt begins with all full blocks of an earlier one continues it: that is a
session, named by its last block. Its pauses are averaged, the latest most, and the next one is
expected a little before that is over. Knows names and times alone; who brings the blocks by then is
`worker/onboard.py`, which is told by `worker/tiers.py`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.core.types import BlockHash

SESSIONS_MAX: Final = 1024
PAUSE_WEIGHT: Final = 0.5
"""Weight of the latest pause in the mean."""
EARLY_SHARE: Final = 0.25
"""Of a pause: so much before its end its blocks are to be there."""


class Visit(NamedTuple):
    """What a request means for its session. `before` names it as it was, None: it is new. It is now
    called `tail`, and will go on at `due_ns`, if that can be told.
    """

    before: BlockHash | None
    tail: BlockHash
    due_ns: int | None


class _Session(NamedTuple):
    names: tuple[BlockHash, ...]
    seen_ns: int
    pause_ns: float | None


class SessionHistory:
    """The latest sessions by their last block."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[BlockHash, _Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def names(self, tail: BlockHash) -> tuple[BlockHash, ...]:
        """Return the blocks of a session, none if it is not known any more."""
        session = self._sessions.get(tail)
        return session.names if session else ()

    def visit(self, names: Sequence[BlockHash], now_ns: int) -> Visit | None:
        """Take in a request by the names of its prompt's full blocks; None: it has none."""
        if not names:
            return None
        before = next((name for name in reversed(names) if name in self._sessions), None)
        pause_ns = None
        if before is not None:
            session = self._sessions.pop(before)
            latest = float(now_ns - session.seen_ns)
            old = latest if session.pause_ns is None else session.pause_ns
            pause_ns = old + PAUSE_WEIGHT * (latest - old)
        tail = names[-1]
        self._sessions[tail] = _Session(tuple(names), now_ns, pause_ns)
        if len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        due_ns = None if pause_ns is None else now_ns + int((1 - EARLY_SHARE) * pause_ns)
        return Visit(before, tail, due_ns)
