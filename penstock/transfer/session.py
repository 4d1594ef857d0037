"""The hand-off session: where one request's crossing stands, on the side that offers and on the
side that pulls.

source   FILLING ──the last block is there──► OFFERED ──Release──► RELEASED
            │                                    │      the decode worker has it, or wants it not
            ├──Cancel──► ABORTED ◄──Cancel───────┤
            │              └──Release──► RELEASED│
            └──lease over──► EXPIRED ◄───────────┘  also from ABORTED: nobody answers any more
sink     OFFERED ──room──► RESERVED ◄──────► IN_FLIGHT ──all of it──► LANDED ► VERIFIED ► RELEASED
            │                 │   more is there   │ ▲                   digests agree
            │                 │                   │ └── once more: a digest is wrong
            └──cancel──► ABORTED ◄────────────────┘ wrong again, or not to be had: recompute

A prompt that is computed in several steps is offered with the first of them: FILLING. Its blocks
are pulled as they are finished, each part by a copy of its own; what is complete is counted, so
the order in which copies and messages come does not matter.

A source keeps its blocks while the lease runs. The sink renews it from the moment an offer is
queued there, so a dead sink costs them for one lease and no longer. A sink that was too late reads
what is no longer the offer's, which generations and digests show. Both sides take every message any
number of times and in any order: what does not fit the state is answered or ignored, never acted
upon.

Push is the same crossing with the other side writing, there to be compared: the sink reserves
blocks before the prefill has begun and grants them, the source writes what is finished and says so,
the sink compares digests. What was granted is not given away before the source has said that it
writes no more, or is gone.

source   OFFERED ──Grant──► RESERVED ◄──────► IN_FLIGHT ──all of it──► LANDED ──Release──► RELEASED
sink     as above; RESERVED is granted, IN_FLIGHT means that what was written is being compared

Pure; `worker/prefill.py` and `worker/decode.py` hold the sessions.
"""

from enum import Enum
from typing import Final

from penstock.core.types import RequestId, WorkerId


class SessionState(Enum):
    """See the module's table."""

    FILLING = "filling"
    OFFERED = "offered"
    RESERVED = "reserved"
    IN_FLIGHT = "in_flight"
    LANDED = "landed"
    VERIFIED = "verified"
    RELEASED = "released"
    ABORTED = "aborted"
    EXPIRED = "expired"


_S = SessionState
Table = dict[SessionState, frozenset[SessionState]]
SOURCE: Final[Table] = {
    _S.FILLING: frozenset({_S.OFFERED, _S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.OFFERED: frozenset({_S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.ABORTED: frozenset({_S.RELEASED, _S.EXPIRED}),
}
SINK: Final[Table] = {
    _S.OFFERED: frozenset({_S.RESERVED, _S.ABORTED}),
    _S.RESERVED: frozenset({_S.IN_FLIGHT, _S.ABORTED}),
    _S.IN_FLIGHT: frozenset({_S.RESERVED, _S.LANDED, _S.ABORTED}),
    _S.LANDED: frozenset({_S.VERIFIED, _S.ABORTED}),
    _S.VERIFIED: frozenset({_S.RELEASED}),
    _S.ABORTED: frozenset({_S.RELEASED}),
}
PUSH_SOURCE: Final[Table] = {
    _S.OFFERED: frozenset({_S.RESERVED, _S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.RESERVED: frozenset({_S.IN_FLIGHT, _S.LANDED, _S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.IN_FLIGHT: frozenset({_S.RESERVED, _S.LANDED, _S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.LANDED: frozenset({_S.RELEASED, _S.ABORTED, _S.EXPIRED}),
    _S.ABORTED: frozenset({_S.RELEASED, _S.EXPIRED}),
}


class Session:
    """One side of one crossing. `table` is one of the three; `peer` is the other side."""

    __slots__ = ("expires_ns", "peer", "request_id", "state", "table")

    def __init__(self, request_id: RequestId, peer: WorkerId, table: Table) -> None:
        self.request_id = request_id
        self.peer = peer
        self.table = table
        self.expires_ns = 0
        self.state = SessionState.FILLING if table is SOURCE else SessionState.OFFERED

    def move_to(self, state: SessionState) -> None:
        """Change state along the table."""
        following = self.table.get(self.state, frozenset())
        assert state in following, (self.request_id, self.state, state)
        self.state = state
