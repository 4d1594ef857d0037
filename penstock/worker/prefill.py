"""`OfferDesk`: the prefill worker's half of the hand-off.

Owns the sequences whose KV is ready and whose blocks a decode worker may read. They keep their
blocks until that worker says `Release`, is known to be dead, or has let the lease run out: a
cancelled offer is withdrawn, never simply freed, because a one-sided read may be under way.
"""

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Send, WakeAt
from penstock.core.messages import (
    Expired,
    Offer,
    Offered,
    Withdraw,
)
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.transfer.session import SOURCE, Session, SessionState
from penstock.worker.sequence import Sequence, SequenceState

LEASE_KEY = "lease"


class OfferDesk:
    """Offers finished prefills and takes their blocks back."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.offered: dict[RequestId, Sequence] = {}
        self.num_expired = 0
        self._sessions: dict[RequestId, Session] = {}
        self._config = config
        self._kv = kv
        self._wakes_ns: int | None = None

    def offer(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Offer the KV of all tokens but the last to the sequence's decode worker."""
        config, request_id = self._config, sequence.request_id
        assert sequence.decode_worker is not None
        assert sequence.num_computed == sequence.target_tokens, request_id
        # A prefill worker never samples, so what it was given is what the decode worker continues.
        assert len(sequence.tokens) == sequence.request.num_tokens
        sequence.move_to(SequenceState.HANDING_OFF)
        sequence.timeline.offered_ns = now_ns
        self.offered[request_id] = sequence
        self._sessions[request_id] = Session(
            request_id, sequence.decode_worker, SOURCE, now_ns + config.lease_ns
        )
        offer = Offer(
            request=sequence.request,
            source=config.worker_id,
            epoch=config.epoch,
            num_tokens=sequence.num_computed,
            groups=self._kv.offer(request_id, sequence.num_computed),
            timeline=sequence.timeline,
            lease_ns=config.lease_ns,
        )
        offered = Offered(request_id=request_id, worker_id=config.worker_id)
        return [
            Send(sequence.decode_worker, offer),
            Send(CONTROLLER, offered),
            *self._wake(now_ns + config.lease_ns),
        ]

    def renew(self, request_ids: tuple[RequestId, ...], now_ns: int) -> None:
        """Give offers that are still here another lease; a withdrawn one may still be read."""
        for request_id in request_ids:
            if request_id in self._sessions:
                self._sessions[request_id].expires_ns = now_ns + self._config.lease_ns

    def withdraw(self, sequence: Sequence) -> list[Command]:
        """Ask for the blocks back; they are freed when the answer comes, or the lease is over."""
        session = self._sessions[sequence.request_id]
        if session.state is SessionState.ABORTED:
            return []
        session.move_to(SessionState.ABORTED)
        message = Withdraw(request_id=sequence.request_id, source=self._config.worker_id)
        return [Send(session.peer, message)]

    def release(self, request_id: RequestId) -> Sequence | None:
        """Take an offer's blocks back; they stay as prefix cache. None: they are back already."""
        if request_id not in self.offered:
            return None
        return self._end(request_id, SessionState.RELEASED)

    def release_all_of(self, worker_id: WorkerId) -> list[Sequence]:
        """Take back everything that was offered to a worker that is gone."""
        lost = [s.request_id for s in self._sessions.values() if s.peer == worker_id]
        return [self._end(request_id, SessionState.RELEASED) for request_id in lost]

    def expire(self, now_ns: int) -> tuple[list[Sequence], list[Command]]:
        """Take back what nobody has claimed in time, and say so."""
        self._wakes_ns = None
        over = [s for s in self._sessions.values() if s.expires_ns <= now_ns]
        commands: list[Command] = []
        for session in over:
            if session.state is SessionState.OFFERED:
                expired = Expired(request_id=session.request_id, worker_id=self._config.worker_id)
                commands.append(Send(CONTROLLER, expired))
        self.num_expired += len(over)
        sequences = [self._end(s.request_id, SessionState.EXPIRED) for s in over]
        if self._sessions:
            commands += self._wake(min(s.expires_ns for s in self._sessions.values()))
        return sequences, commands

    def _end(self, request_id: RequestId, state: SessionState) -> Sequence:
        self._sessions.pop(request_id).move_to(state)
        sequence = self.offered.pop(request_id)
        self._kv.close(request_id)
        sequence.move_to(SequenceState.GONE)
        return sequence

    def _wake(self, at_ns: int) -> list[Command]:
        """Ask to be woken for the first lease that may end; one request at a time is enough."""
        if self._wakes_ns is not None and self._wakes_ns <= at_ns:
            return []
        self._wakes_ns = at_ns
        return [WakeAt(at_ns, LEASE_KEY)]
