"""`PullDesk`: the decode worker's half of the hand-off.

Owns the arrivals: offers that wait for room, and those that have it and are being pulled. An offer
gets blocks laid out like the offered ones, prefix hits of our own are not pulled again, the rest
crosses in as few spans as both sides' runs allow: at once, or part by part while the prefill worker
still computes. From a peer whose blocks have another shape it is tokens that are pulled
(`worker/reshaping.py`). What has landed with the right digests runs; a part that has not is pulled
once more, and then all of it is computed here. Either way the prefill worker is released, and its
lease is renewed until then.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from penstock.core.block import KVLayout
from penstock.core.config import WorkerConfig
from penstock.core.events import (
    Command,
    MoveDone,
    Send,
    SubmitMove,
    WakeAt,
)
from penstock.core.messages import UNKNOWN, Grant, Offer, Progress, Release, Renew
from penstock.core.types import RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.kv.group import Pull
from penstock.kv.tiers import RAW
from penstock.transfer.reshape import whole_blocks
from penstock.transfer.session import SINK, Session, SessionState
from penstock.worker.arrival import Arrival, PendingMove
from penstock.worker.numbers import Numbers
from penstock.worker.reshaping import Reshaping
from penstock.worker.sequence import Sequence, SequenceState
from penstock.worker.wires import Wires

RENEW_KEY = "renew"
RENEWALS_PER_LEASE = 3
ENDED_MAX = 4096
PULLS_MAX = 2


@dataclass(slots=True)
class PullDesk:
    """Takes offers in, reserves, pulls, verifies and releases."""

    config: WorkerConfig
    kv: KVCache
    move_ids: Numbers
    arrivals: dict[RequestId, Arrival] = field(default_factory=dict)
    pending: deque[Arrival] = field(default_factory=deque)
    num_corrupt: int = 0
    num_stale: int = 0
    num_recomputed: int = 0
    wires: Wires = field(init=False)
    _layouts: dict[WorkerId, KVLayout] = field(default_factory=dict)
    _moves: dict[int, PendingMove] = field(default_factory=dict)
    _ended: dict[RequestId, None] = field(default_factory=dict)
    _is_wake_due: bool = False

    def __post_init__(self) -> None:
        """Know of no link yet."""
        self.wires = Wires(self.config)

    @property
    def num_admitted(self) -> int:
        """Arrivals that hold blocks here."""
        return len(self.arrivals) - len(self.pending)

    # ------------------------------------------------------------------------------------ messages

    def meet(self, worker_id: WorkerId, layout: KVLayout) -> None:
        """Know in what shape a peer keeps its KV."""
        self._layouts[worker_id] = layout

    def receive(self, offer: Offer, now_ns: int) -> list[Command]:
        """Queue an offer. One that is over here already is released, one that waits is known."""
        request_id = offer.request.request_id
        if request_id in self._ended:
            return [self._release(offer.source, request_id)]
        if request_id in self.arrivals:
            return []
        session = Session(request_id, offer.source, SINK)
        arrival = Arrival(offer, session, now_ns, offer.num_ready, [offer.groups])
        self.arrivals[request_id] = arrival
        self.pending.append(arrival)
        return self._wake(now_ns)

    def progress(self, message: Progress, now_ns: int) -> list[Command]:
        """Take in that more of an offer is ready.

        What does not follow on what is known is ignored: a renewal will ask for what is missing.
        """
        arrival = self.arrivals.get(message.request_id)
        if arrival is None:
            if message.request_id in self._ended:
                return [self._release(message.source, message.request_id)]
            # Its offer was lost, or comes late.
            known, ours = (message.request_id,), self.config.worker_id
            ask = Renew(request_ids=known, num_ready=(UNKNOWN,), worker_id=ours)
            return [Send(message.source, ask)]
        if message.after != arrival.num_ready or message.epoch != arrival.offer.epoch:
            return []
        arrival.num_ready = message.num_ready
        arrival.unpulled.append(message.groups)
        arrival.received_ns = now_ns
        if message.timeline is not None:
            arrival.offer.timeline.take_prefill(message.timeline)
        is_wanted = arrival.outcome is SequenceState.RUNNING
        return self._pull(arrival) if arrival.sequence is not None and is_wanted else []

    def renew(self, now_ns: int) -> list[Command]:
        """Renew the leases of everything that waits or is being pulled.

        A grant is said again, and so is that it is revoked, until the peer has heard it.
        """
        self._is_wake_due = False
        by_peer: dict[WorkerId, list[Arrival]] = {}
        for arrival in self.arrivals.values():
            by_peer.setdefault(arrival.session.peer, []).append(arrival)
        commands: list[Command] = []
        for peer, arrivals in by_peer.items():
            renew = Renew(
                request_ids=tuple(a.session.request_id for a in arrivals),
                num_ready=tuple(a.num_ready for a in arrivals),
                worker_id=self.config.worker_id,
            )
            commands.append(Send(peer, renew))
            commands += [self._grant(a) for a in arrivals if a.offer.is_push and a.sequence]
        return commands + self._wake(now_ns) if commands else []

    # ---------------------------------------------------------------------------------- room, pulls

    def admit(
        self, arrival_number: int, headroom_blocks: int, now_ns: int
    ) -> tuple[Sequence, list[Command]] | None:
        """Give blocks to a pending offer and start its pull; None when there is no room.

        The first that is complete goes before those that are still being computed, which would
        let their blocks wait. `headroom_blocks` are to stay free for those who run already: an
        offer that comes in only to preempt, or be preempted, would have been pulled for nothing.
        """
        if not self.pending:
            return None
        complete = (a for a in self.pending if a.num_ready == a.offer.num_tokens)
        arrival = next(complete, self.pending[0])
        offer = arrival.offer
        gaps = tuple(range(first, first + count) for first, count in offer.gaps or ())
        needed = self.config.layout.num_blocks(offer.num_tokens) - sum(map(len, gaps))
        available = map(int.__add__, self.kv.free_blocks, self.kv.cached_blocks)
        if headroom_blocks and min(available) < needed + headroom_blocks:
            return None
        sequence = Sequence(
            offer.request,
            self.config,
            arrival=arrival_number,
            timeline=offer.timeline,
            prefill_worker=offer.source,
        )
        if self.config.is_prefix_caching:
            sequence.name_blocks(self.config.layout.block_size)
        theirs, ours = self._layouts.get(offer.source), self.config.layout
        is_reshaped = theirs is not None and theirs != ours
        runs = None if is_reshaped else offer.runs
        hashes, num_tokens = sequence.hashes, offer.num_tokens
        adoption = self.kv.adopt(sequence.request_id, hashes, num_tokens, runs, gaps=gaps)
        if adoption is None:
            return None
        if theirs is not None and is_reshaped:
            arrival.reshaping = Reshaping(theirs, ours, offer.num_tokens, adoption.groups)
        self.pending.remove(arrival)
        arrival.session.move_to(SessionState.RESERVED)
        arrival.sequence, arrival.adoption = sequence, adoption
        arrival.reserved_ns = now_ns
        sequence.num_computed, sequence.is_selected = adoption.cached_tokens, offer.gaps is not None
        sequence.capacity_tokens = self.kv.capacity(sequence.request_id)
        return sequence, [self._grant(arrival)] if offer.is_push else self._pull(arrival)

    def land(self, done: MoveDone, now_ns: int) -> tuple[Sequence | None, list[Command]]:
        """Take in the end of a move; return the sequence if that was the last there was to copy.

        Its state is HANDING_OFF when it may run now, WAITING when its KV has to be computed here,
        GONE when nobody wants it; the last two hold no blocks.
        """
        asked = self._moves.pop(done.move_id)
        arrival = asked.arrival
        arrival.num_moves -= 1
        self.wires.note(arrival.offer.source, done)
        self.num_corrupt += done.is_corrupt
        self.num_stale += done.is_stale
        is_wanted = arrival.outcome is SequenceState.RUNNING
        tries_max = 1 if arrival.offer.is_push else PULLS_MAX
        if is_wanted and done.is_corrupt and asked.tries < tries_max:
            return None, [self._submit(replace(asked, codec=RAW, tries=asked.tries + 1))]
        arrival.is_spoiled |= is_wanted and done.is_corrupt
        if is_wanted and (done.is_corrupt or done.error is not None):
            self._abort(arrival, SequenceState.WAITING)
        elif is_wanted:
            self._keep(asked, done)
        return self._settle(arrival, now_ns)

    def source_of(self, move_id: int) -> WorkerId:
        """Return whose blocks a move under way copies."""
        return self._moves[move_id].arrival.offer.source

    def drop(
        self, request_id: RequestId, now_ns: int, *, is_fenced: bool = False
    ) -> tuple[Sequence | None, list[Command]]:
        """Forget an arrival, if there is one, as soon as nothing is being copied for it.

        `is_fenced` says that its prefill worker writes nothing for it (any more). Returns the
        sequence, GONE or WAITING, if it was admitted and is over.
        """
        arrival = self.arrivals.get(request_id)
        if arrival is None:
            self.bury(request_id)
            return None, []
        arrival.is_fenced |= is_fenced
        is_recomputed = is_fenced and arrival.outcome is SequenceState.WAITING
        if arrival.outcome is not SequenceState.GONE and not is_recomputed:
            self._abort(arrival, SequenceState.GONE)
        return self._settle(arrival, now_ns)

    def drop_all_of(self, worker_id: WorkerId, now_ns: int) -> list[Sequence]:
        """Forget what a worker that is gone cannot complete; the controller sends it elsewhere.

        Copies of what was complete are left alone: memory that is mapped stays, and what was
        offered does not change. Returns the sequences that are over.
        """
        self.wires.forget(worker_id)
        lost = [
            a.session.request_id
            for a in self.arrivals.values()
            if a.session.peer == worker_id and (a.is_written or not a.is_complete)
        ]
        ended = [self.drop(request_id, now_ns, is_fenced=True)[0] for request_id in lost]
        return [sequence for sequence in ended if sequence is not None]

    def bury(self, request_id: RequestId) -> None:
        """Remember that a request is over here, so that a late offer is not taken up."""
        self._ended[request_id] = None
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]

    # ------------------------------------------------------------------------------------- internal

    def _pull(self, arrival: Arrival) -> list[Command]:
        """Ask for a copy of what is ready and has not been asked for.

        The last part is asked for even if nothing of it is missing here: its landing is the end.
        """
        assert arrival.adoption is not None
        offered, arrival.unpulled = arrival.unpulled, []
        if arrival.reshaping is not None:
            reshapes = arrival.reshaping.ask(offered)
            is_empty = not any(r.end for r in reshapes)
            asked = [PendingMove(arrival, (), reshapes=reshapes)]
        else:
            parts = map(arrival.adoption.pulls, offered)
            pulls = tuple(map(Pull.joined, zip(*parts, strict=True)))
            is_empty = not any(p.source_ids for p in pulls)
            asked = [PendingMove(arrival, *p) for p in self.wires.parts(arrival, pulls)]
        if is_empty and not arrival.is_complete:
            return []
        return [self._submit(each) for each in asked]

    def _submit(self, asked: PendingMove) -> Command:
        arrival = asked.arrival
        if arrival.session.state is not SessionState.IN_FLIGHT:
            arrival.session.move_to(SessionState.IN_FLIGHT)
        arrival.num_moves += 1
        move_id = self.move_ids.next()
        self._moves[move_id] = asked
        return SubmitMove(asked.move(move_id))

    def _keep(self, asked: PendingMove, done: MoveDone) -> None:
        """Count what has landed, and keep the digests of full blocks."""
        arrival = asked.arrival
        assert arrival.adoption is not None
        num_full = arrival.offer.num_tokens // self.config.layout.block_size
        groups = zip(asked.pulls, arrival.adoption.groups, strict=not asked.reshapes)
        for index, (pull, adopted) in enumerate(groups):
            arrival.num_pulled += len(pull.source_ids)
            arrival.is_verified &= pull.is_verified
            # The last block may not be full: its digest is over what it holds now; it will grow.
            partial_id = adopted.destination_of.get(num_full)
            # What came encoded has other bytes than were offered.
            digests = done.digests[index] if pull.digests and done.digests else pull.digests
            rows = zip(pull.destination_ids, digests, strict=False)
            self.kv.note_digests(index, [row for row in rows if row[0] != partial_id])
        for index, (wanted, digests) in enumerate(zip(asked.reshapes, done.digests, strict=False)):
            filled = whole_blocks(wanted, self.config.layout.block_size)
            self.kv.note_digests(index, zip(filled, digests, strict=False))
        arrival.is_verified &= all(r.is_verified for r in asked.reshapes)
        # What was pushed has been copied by the other side, which has stamped how long that took.
        copied_ns = 0 if arrival.offer.is_push else done.finished_ns - done.started_ns
        arrival.offer.timeline.take_pull(
            done.transport, done.num_bytes, done.num_spans, copied_ns=copied_ns
        )

    def _abort(self, arrival: Arrival, outcome: SequenceState) -> None:
        if arrival.session.state is not SessionState.ABORTED:
            arrival.session.move_to(SessionState.ABORTED)
        self.num_recomputed += outcome is SequenceState.WAITING
        arrival.outcome = outcome

    def _settle(self, arrival: Arrival, now_ns: int) -> tuple[Sequence | None, list[Command]]:
        """End an arrival if nothing is being copied for it and nothing more is to come."""
        session = arrival.session
        if arrival.num_moves:
            return None, []
        if arrival.is_written:
            return None, [self._grant(arrival)]
        if arrival.outcome is SequenceState.RUNNING:
            if not arrival.is_complete:
                session.move_to(SessionState.RESERVED)
                return None, []
            session.move_to(SessionState.LANDED)
            if self._is_whole(arrival):
                session.move_to(SessionState.VERIFIED)
                self._take_over(arrival, now_ns)
            else:
                self._abort(arrival, SequenceState.WAITING)
        del self.arrivals[session.request_id]
        session.move_to(SessionState.RELEASED)
        release = self._release(session.peer, session.request_id, is_spoiled=arrival.is_spoiled)
        sequence = arrival.sequence
        if sequence is None:
            self.pending.remove(arrival)
            self.bury(session.request_id)
        elif arrival.outcome is not SequenceState.RUNNING:
            self.kv.close(session.request_id)
            sequence.lose_blocks()
            sequence.is_preempted = True
            sequence.move_to(arrival.outcome)
        return sequence, [release]

    def _is_whole(self, arrival: Arrival) -> bool:
        """Tell whether every block that was missing has come: a peer may have offered too few."""
        assert arrival.adoption is not None
        if arrival.reshaping is not None:
            return arrival.reshaping.is_whole
        return arrival.num_pulled == sum(len(g.destination_of) for g in arrival.adoption.groups)

    def _take_over(self, arrival: Arrival, now_ns: int) -> None:
        """The KV is ours now: count it, name it, and stamp when."""
        sequence, num_tokens = arrival.sequence, arrival.offer.num_tokens
        assert sequence is not None
        sequence.num_computed = num_tokens
        self.kv.advance(sequence.request_id, num_tokens, sequence.hashes)
        timeline = sequence.timeline
        timeline.offer_received_ns = arrival.received_ns
        # With blocks reserved while the prefill went on, nobody has waited for room.
        timeline.reserved_ns = max(arrival.reserved_ns, arrival.received_ns)
        timeline.held_ns, timeline.pulled_ns = arrival.reserved_ns, now_ns
        timeline.pull_verified = arrival.is_verified

    def _grant(self, arrival: Arrival) -> Command:
        """Let the prefill worker write, or tell it to stop."""
        is_wanted = arrival.outcome is SequenceState.RUNNING
        grant = Grant(
            request_id=arrival.session.request_id,
            worker_id=self.config.worker_id,
            epoch=self.config.epoch,
            num_ready=arrival.num_ready,
            groups=arrival.granted,
            is_revoked=not is_wanted,
        )
        return Send(arrival.session.peer, grant)

    def _release(self, to: WorkerId, of: RequestId, *, is_spoiled: bool = False) -> Send:
        ours = self.config.worker_id
        return Send(to, Release(request_id=of, worker_id=ours, is_spoiled=is_spoiled))

    def _wake(self, now_ns: int) -> list[Command]:
        if self._is_wake_due:
            return []
        self._is_wake_due = True
        return [WakeAt(now_ns + self.config.lease_ns // RENEWALS_PER_LEASE, RENEW_KEY)]
