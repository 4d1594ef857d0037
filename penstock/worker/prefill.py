"""`OfferDesk`: the prefill worker's half of the hand-off.

Owns the crossings of sequences whose blocks a decode worker may read: while they are still being
computed (the first chunk is offered at once, the others follow as they are finished), and until
that worker says `Release`, is known to be dead, or has let the lease run out. A cancelled offer is
withdrawn, never simply freed, because a one-sided read may be under way. Freeing is the worker
core's: it knows whether a step still writes the blocks.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

from penstock.core.config import Handoff, WorkerConfig
from penstock.core.events import Command, Send
from penstock.core.messages import UNKNOWN, Expired, Offer, Offered, Progress, Withdraw
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.transfer.session import SOURCE, Session, SessionState
from penstock.worker.lease import Leases
from penstock.worker.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Crossing:
    """A sequence whose blocks a peer may read; the blocks of `num_ready` tokens are offered."""

    sequence: Sequence
    session: Session
    num_ready: int = 0


class OfferDesk:
    """Offers prefills, finished or under way, and says when their blocks are free again."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.crossings: dict[RequestId, Crossing] = {}
        self.num_expired = 0
        self._config = config
        self._kv = kv
        self._leases = Leases(config.lease_ns)

    def offer(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Offer what is new of the KV of all tokens but the last to the sequence's decode worker.

        A sequence that is still being computed goes on running, pinned, if its blocks can be read
        meanwhile: then none of them may be taken from it.
        """
        # A prefill worker never samples, so what it was given is what the decode worker continues.
        assert len(sequence.tokens) == sequence.request.num_tokens
        crossing = self.crossings.get(sequence.request_id)
        is_last = sequence.num_computed == sequence.target_tokens
        if crossing is None:
            if not is_last and not self._is_worth_streaming(sequence):
                return []
            return self._begin(sequence, now_ns)
        if crossing.session.state is not SessionState.FILLING:
            return []
        before, crossing.num_ready = crossing.num_ready, self._num_ready(sequence)
        commands = self._complete(crossing, now_ns) if is_last else []
        if crossing.num_ready == before:
            return commands
        return [self._progress(crossing, before), *commands]

    def renew(
        self, known: Iterable[tuple[RequestId, int]], peer: WorkerId, now_ns: int
    ) -> list[Command]:
        """Give offers that are still here another lease; a withdrawn one may still be read.

        `known` says of each request how many tokens the peer knows to be ready. What it has missed
        is said again: progress, or that there is nothing to wait for.
        """
        commands: list[Command] = []
        for request_id, num_ready in known:
            crossing = self.crossings.get(request_id)
            if crossing is None:
                commands.append(self._withdraw(request_id, peer))
                continue
            self._leases.renew(crossing.session, now_ns)
            if crossing.session.state is SessionState.ABORTED:
                commands.append(self._withdraw(request_id, peer))
            elif num_ready == UNKNOWN:
                commands.append(self._offer_of(crossing))
            elif num_ready < crossing.num_ready:
                commands.append(self._progress(crossing, num_ready))
        return commands

    def withdraw(self, sequence: Sequence) -> list[Command]:
        """Ask for the blocks back; they are free when the answer comes, or the lease is over."""
        session = self.crossings[sequence.request_id].session
        if session.state is SessionState.ABORTED:
            return []
        session.move_to(SessionState.ABORTED)
        sequence.is_pinned = False
        return [self._withdraw(sequence.request_id, session.peer)]

    def release(self, request_id: RequestId, *, is_spoiled: bool = False) -> Sequence | None:
        """Return the sequence whose blocks nobody reads any more. None: that is known already.

        What is spoiled is not computed upon: its names are dropped, and nobody hits it again.
        """
        if request_id not in self.crossings:
            return None
        if is_spoiled:
            self._kv.disown(request_id)
        return self._end(request_id, SessionState.RELEASED)

    def release_all_of(self, worker_id: WorkerId) -> list[Sequence]:
        """Take back everything that was offered to a worker that is gone."""
        lost = [i for i, c in self.crossings.items() if c.session.peer == worker_id]
        return [self._end(request_id, SessionState.RELEASED) for request_id in lost]

    def expire(self, now_ns: int) -> tuple[list[Sequence], list[Command]]:
        """Take back what nobody has claimed in time, and say so."""
        over, commands = self._leases.over([c.session for c in self.crossings.values()], now_ns)
        for session in over:
            if session.state is not SessionState.ABORTED:
                expired = Expired(request_id=session.request_id, worker_id=self._config.worker_id)
                commands.append(Send(CONTROLLER, expired))
        self.num_expired += len(over)
        sequences = [self._end(s.request_id, SessionState.EXPIRED) for s in over]
        return sequences, commands

    def _is_worth_streaming(self, sequence: Sequence) -> bool:
        """Tell whether a prefill can be offered while it goes on: a block is finished, and every
        other one it will want has its place, so that it never has to give up any. Not before it is
        known which of them are kept.
        """
        return (
            not sequence.is_to_select
            and self._config.handoff is Handoff.STREAM
            and self._num_ready(sequence) > 0
            and self._kv.is_reserved(sequence.request_id, sequence.target_tokens)
        )

    def _num_ready(self, sequence: Sequence) -> int:
        """Tokens whose blocks will not be written any more."""
        if sequence.num_computed == sequence.target_tokens:
            return sequence.num_computed
        return sequence.num_computed - sequence.num_computed % self._config.layout.block_size

    def _begin(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Offer what there is; the rest follows if that is not all."""
        request_id = sequence.request_id
        assert sequence.decode_worker is not None
        num_ready = self._num_ready(sequence)
        is_last = num_ready == sequence.target_tokens
        session = Session(request_id, sequence.decode_worker, SOURCE)
        crossing = self.crossings[request_id] = Crossing(sequence, session, num_ready)
        sequence.is_pinned = not is_last
        # Stamped first: the offer carries the timeline.
        commands = self._complete(crossing, now_ns) if is_last else []
        lease = self._leases.begin(session, now_ns)
        return [self._offer_of(crossing), *commands, *lease]

    def _offer_of(self, crossing: Crossing) -> Command:
        """Say all that is ready."""
        config, sequence, num_ready = self._config, crossing.sequence, crossing.num_ready
        request_id, is_last = sequence.request_id, num_ready == sequence.target_tokens
        offer = Offer(
            request=sequence.request,
            source=config.worker_id,
            epoch=config.epoch,
            num_tokens=sequence.target_tokens,
            num_ready=num_ready,
            groups=self._kv.offer(request_id, num_ready, is_last=is_last),
            runs=self._kv.runs(request_id, sequence.target_tokens),
            gaps=self._kv.gaps_of(request_id) if sequence.is_selected else None,
            timeline=copy(sequence.timeline),
            lease_ns=config.lease_ns,
        )
        return Send(crossing.session.peer, offer)

    def _complete(self, crossing: Crossing, now_ns: int) -> list[Command]:
        """Note that the last block is there, and tell the controller."""
        sequence = crossing.sequence
        crossing.session.move_to(SessionState.OFFERED)
        sequence.move_to(SequenceState.HANDING_OFF)
        sequence.is_pinned = False
        sequence.timeline.offered_ns = now_ns
        worker_id = self._config.worker_id
        return [Send(CONTROLLER, Offered(request_id=sequence.request_id, worker_id=worker_id))]

    def _progress(self, crossing: Crossing, after: int) -> Command:
        """Say what is ready beyond `after` tokens."""
        sequence, num_ready = crossing.sequence, crossing.num_ready
        is_last = num_ready == sequence.target_tokens
        message = Progress(
            request_id=sequence.request_id,
            source=self._config.worker_id,
            epoch=self._config.epoch,
            after=after,
            num_ready=num_ready,
            groups=self._kv.offer(sequence.request_id, num_ready, after=after, is_last=is_last),
            timeline=copy(sequence.timeline) if is_last else None,
        )
        return Send(crossing.session.peer, message)

    def _withdraw(self, request_id: RequestId, peer: WorkerId) -> Command:
        return Send(peer, Withdraw(request_id=request_id, source=self._config.worker_id))

    def _end(self, request_id: RequestId, state: SessionState) -> Sequence:
        crossing = self.crossings.pop(request_id)
        crossing.session.move_to(state)
        crossing.sequence.is_pinned = False
        return crossing.sequence
