"""`PullDesk`: the decode worker's half of the hand-off.

Owns offers that wait for room and pulls that are under way. An offer gets blocks laid out like the
offered ones, prefix hits of our own are not pulled again, the rest crosses in as few spans as both
sides' runs allow. What has landed with the right digests runs; what has not is pulled once more and
then computed here. Either way the prefill worker is released, and its lease is renewed until then.
"""

from collections import deque
from dataclasses import dataclass

from penstock.core.config import WorkerConfig
from penstock.core.events import (
    Command,
    Move,
    MoveClass,
    MoveDone,
    Send,
    SubmitMove,
    WakeAt,
)
from penstock.core.messages import Offer, Release, Renew
from penstock.core.types import RequestId, WorkerId
from penstock.kv.cache import Adoption, KVCache
from penstock.transfer.plan import align
from penstock.transfer.session import SINK, Session, SessionState
from penstock.worker.sequence import Sequence, SequenceState

RENEW_KEY = "renew"
RENEWALS_PER_LEASE = 3
ENDED_MAX = 4096
PULLS_MAX = 2


@dataclass(frozen=True, slots=True)
class PendingOffer:
    """An offer that waits for room, and when it came."""

    offer: Offer
    session: Session
    received_ns: int


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull under way, for which sequence, and what it fills."""

    sequence: Sequence
    session: Session
    offer: Offer
    adoption: Adoption


class PullDesk:
    """Takes offers in, reserves, pulls, verifies and releases."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.pending: deque[PendingOffer] = deque()
        self.pulls: dict[int, Pull] = {}
        self.num_corrupt = 0
        self.num_recomputed = 0
        self._config = config
        self._kv = kv
        self._num_moves = 0
        self._ended: dict[RequestId, None] = {}
        self._is_wake_due = False

    def receive(self, offer: Offer, now_ns: int) -> list[Command]:
        """Queue an offer. One that is over here already is released, one that waits is known."""
        request_id = offer.request.request_id
        if request_id in self._ended:
            return [self._release(offer.source, request_id)]
        if any(entry.session.request_id == request_id for entry in self.pending):
            return []
        session = Session(request_id, offer.source, SINK)
        self.pending.append(PendingOffer(offer, session, now_ns))
        return self._wake(now_ns)

    def bury(self, request_id: RequestId) -> None:
        """Remember that a request is over here, so that a late offer is not taken up."""
        self._ended[request_id] = None
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]

    def admit(
        self, arrival: int, headroom_blocks: int, now_ns: int
    ) -> tuple[Sequence, list[Command]] | None:
        """Give blocks to the first pending offer and start its pull; None when there is no room.

        `headroom_blocks` are to stay free for those who run already: an offer that comes in only to
        preempt somebody, or to be preempted itself, would have been pulled for nothing.
        """
        if not self.pending:
            return None
        offer = self.pending[0].offer
        needed = max(len(group.block_ids) for group in offer.groups)
        available = map(int.__add__, self._kv.free_blocks, self._kv.cached_blocks)
        if headroom_blocks and min(available) < needed + headroom_blocks:
            return None
        sequence = Sequence(
            offer.request,
            self._config,
            arrival=arrival,
            timeline=offer.timeline,
            prefill_worker=offer.source,
        )
        if self._config.is_prefix_caching:
            sequence.name_blocks(self._config.layout.block_size)
        adoption = self._kv.adopt(
            sequence.request_id, sequence.hashes, offer.num_tokens, offer.groups
        )
        if adoption is None:
            return None
        entry = self.pending.popleft()
        sequence.num_computed = adoption.cached_tokens
        sequence.capacity_tokens = self._kv.capacity(sequence.request_id)
        sequence.timeline.offer_received_ns = entry.received_ns
        sequence.timeline.reserved_ns = now_ns
        return sequence, [self._pull(Pull(sequence, entry.session, offer, adoption))]

    def land(self, done: MoveDone, now_ns: int) -> tuple[Sequence, list[Command]]:
        """Take in the end of a move.

        The sequence returned is HANDING_OFF while another pull is under way or when it may run now
        (then its session is over), WAITING when its KV has to be computed here, GONE when nobody
        wants it; the last two hold no blocks.
        """
        pull = self.pulls.pop(done.move_id)
        sequence, session = pull.sequence, pull.session
        if session.state is SessionState.ABORTED:
            return sequence, self._give_up(pull, SequenceState.GONE)
        session.move_to(SessionState.LANDED)
        self.num_corrupt += done.is_corrupt
        if done.is_corrupt and session.num_pulls < PULLS_MAX:
            return sequence, [self._pull(pull)]
        if done.is_corrupt or done.error is not None:
            session.move_to(SessionState.ABORTED)
            self.num_recomputed += 1
            sequence.is_preempted = True
            return sequence, self._give_up(pull, SequenceState.WAITING)
        session.move_to(SessionState.VERIFIED)
        session.move_to(SessionState.RELEASED)
        self._take_over(pull)
        timeline = sequence.timeline
        timeline.pulled_ns, timeline.transport = now_ns, done.transport
        timeline.pull_bytes, timeline.pull_spans = done.num_bytes, done.num_spans
        timeline.pull_verified = all(p.digests or not p.source_ids for p in pull.adoption.pulls)
        return sequence, [self._release(session.peer, session.request_id)]

    def cancel(self, sequence: Sequence) -> None:
        """Note that nobody wants what is being pulled; its landing ends it."""
        for pull in self.pulls.values():
            if pull.sequence is sequence and pull.session.state is not SessionState.ABORTED:
                pull.session.move_to(SessionState.ABORTED)

    def drop(self, request_id: RequestId) -> list[Command]:
        """Forget a pending offer, if there is one, and release its source."""
        self.bury(request_id)
        for entry in self.pending:
            if entry.session.request_id == request_id:
                self.pending.remove(entry)
                return [self._release(entry.offer.source, request_id)]
        return []

    def drop_all_of(self, worker_id: WorkerId) -> None:
        """Forget the offers of a worker that is gone; the controller sends their requests
        elsewhere.

        Pulls under way are left alone: memory that is mapped stays, and what was offered does not
        change.
        """
        for entry in [e for e in self.pending if e.offer.source == worker_id]:
            self.pending.remove(entry)
            self.bury(entry.session.request_id)

    def renew(self, now_ns: int) -> list[Command]:
        """Renew the leases of everything that waits or is being pulled."""
        self._is_wake_due = False
        sessions = [e.session for e in self.pending] + [p.session for p in self.pulls.values()]
        if not sessions:
            return []
        by_peer: dict[WorkerId, list[RequestId]] = {}
        for session in sessions:
            by_peer.setdefault(session.peer, []).append(session.request_id)
        worker_id = self._config.worker_id
        return [
            Send(peer, Renew(request_ids=tuple(ids), worker_id=worker_id))
            for peer, ids in by_peer.items()
        ] + self._wake(now_ns)

    def _pull(self, pull: Pull) -> Command:
        pull.session.move_to(SessionState.IN_FLIGHT)
        pull.session.num_pulls += 1
        self._num_moves += 1
        self.pulls[self._num_moves] = pull
        pulls = pull.adoption.pulls
        move = Move(
            move_id=self._num_moves,
            kind=MoveClass.HANDOFF,
            request_id=pull.session.request_id,
            source=pull.offer.source,
            epoch=pull.offer.epoch,
            spans=tuple(tuple(align(p.source_ids, p.destination_ids)) for p in pulls),
            digests=tuple(p.digests for p in pulls),
        )
        return SubmitMove(move)

    def _take_over(self, pull: Pull) -> None:
        """The KV is ours now: count it, name it, and keep the digests of full blocks."""
        sequence, num_tokens = pull.sequence, pull.offer.num_tokens
        sequence.num_computed = num_tokens
        num_full = num_tokens // self._config.layout.block_size
        offered = zip(pull.offer.groups, pull.adoption.pulls, strict=True)
        for index, (group, pulled) in enumerate(offered):
            # The last block is not full: its digest is over what it holds now, and it will grow.
            is_partial = group.first + len(group.block_ids) > num_full
            partial_id = group.block_ids[-1] if is_partial else None
            rows = zip(pulled.source_ids, pulled.destination_ids, pulled.digests, strict=False)
            full = [(ours, digest) for theirs, ours, digest in rows if theirs != partial_id]
            self._kv.note_digests(index, full)
        self._kv.advance(sequence.request_id, num_tokens, sequence.hashes)

    def _give_up(self, pull: Pull, state: SequenceState) -> list[Command]:
        sequence, session = pull.sequence, pull.session
        session.move_to(SessionState.RELEASED)
        self._kv.close(sequence.request_id)
        sequence.num_computed = sequence.capacity_tokens = 0
        sequence.move_to(state)
        return [self._release(session.peer, session.request_id)]

    def _release(self, to: WorkerId, request_id: RequestId) -> Send:
        return Send(to, Release(request_id=request_id, worker_id=self._config.worker_id))

    def _wake(self, now_ns: int) -> list[Command]:
        if self._is_wake_due:
            return []
        self._is_wake_due = True
        return [WakeAt(now_ns + self._config.lease_ns // RENEWALS_PER_LEASE, RENEW_KEY)]
