"""`PullDesk`: the decode worker's half of the hand-off.

Owns offers that wait for room and pulls that are under way. An offer gets blocks laid out like the
offered ones, prefix hits of our own are not pulled again, the rest crosses in as few spans as both
sides' runs allow; when it has landed the prefill worker is released and the sequence runs.
"""

from collections import deque
from dataclasses import dataclass

from penstock.core.config import WorkerConfig
from penstock.core.events import (
    Command,
    Move,
    MoveClass,
    MoveDone,
    Offer,
    Release,
    RequestFailed,
    Send,
    SubmitMove,
)
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.transfer.plan import align
from penstock.worker.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Pull:
    """A move under way and the sequence it is for."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PendingOffer:
    """An offer that waits for room, and when it came."""

    offer: Offer
    received_ns: int


class PullDesk:
    """Takes offers in, reserves, pulls and releases."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.pending: deque[PendingOffer] = deque()
        self.pulls: dict[int, Pull] = {}
        self._config = config
        self._kv = kv
        self._num_moves = 0

    def receive(self, offer: Offer, now_ns: int) -> None:
        """Queue an offer."""
        self.pending.append(PendingOffer(offer, now_ns))

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
        received_ns = self.pending.popleft().received_ns
        sequence.num_computed = adoption.cached_tokens
        sequence.capacity_tokens = self._kv.capacity(sequence.request_id)
        timeline = sequence.timeline
        timeline.offer_received_ns, timeline.reserved_ns = received_ns, now_ns
        self._num_moves += 1
        self.pulls[self._num_moves] = Pull(sequence, offer.num_tokens)
        move = Move(
            move_id=self._num_moves,
            kind=MoveClass.HANDOFF,
            request_id=sequence.request_id,
            source=offer.source,
            epoch=offer.epoch,
            spans=tuple(
                tuple(align(pull.source_ids, pull.destination_ids)) for pull in adoption.pulls
            ),
        )
        return sequence, [SubmitMove(move)]

    def land(self, done: MoveDone, now_ns: int) -> tuple[Sequence, list[Command]]:
        """Finish a pull: release the source, and hand the sequence on to run unless it failed or is
        closing.

        The sequence returned is PULLING when it may run; otherwise it is GONE and its blocks are
        free.
        """
        pull = self.pulls.pop(done.move_id)
        sequence = pull.sequence
        commands: list[Command] = [self._release(sequence)]
        if sequence.state is SequenceState.CLOSING or done.error is not None:
            if sequence.state is not SequenceState.CLOSING:
                commands.append(_failed(sequence.request_id, self._config.worker_id, done.error))
            self._kv.close(sequence.request_id)
            sequence.move_to(SequenceState.GONE)
            return sequence, commands
        sequence.num_computed = pull.num_tokens
        self._kv.advance(sequence.request_id, pull.num_tokens, sequence.hashes)
        timeline = sequence.timeline
        timeline.pulled_ns = now_ns
        timeline.transport, timeline.pull_bytes = done.transport, done.num_bytes
        timeline.pull_spans = done.num_spans
        return sequence, commands

    def drop(self, request_id: RequestId) -> list[Command]:
        """Forget a pending offer, if there is one, and release its source."""
        for entry in self.pending:
            if entry.offer.request.request_id == request_id:
                self.pending.remove(entry)
                return [_release(entry.offer.source, request_id, self._config.worker_id)]
        return []

    def drop_all_of(self, worker_id: WorkerId) -> list[Command]:
        """Forget the offers of a worker that is gone and say that their requests must go elsewhere.

        Pulls under way are left alone: the memory is still mapped, and what was offered does not
        change.
        """
        lost = [e for e in self.pending if e.offer.source == worker_id]
        self.pending = deque(e for e in self.pending if e.offer.source != worker_id)
        reason = f"prefill worker {worker_id} was lost before its blocks were pulled"
        return [_failed(e.offer.request.request_id, self._config.worker_id, reason) for e in lost]

    def _release(self, sequence: Sequence) -> Command:
        assert sequence.prefill_worker is not None
        return _release(sequence.prefill_worker, sequence.request_id, self._config.worker_id)


def _release(to: WorkerId, request_id: RequestId, worker_id: WorkerId) -> Send:
    return Send(to, Release(request_id=request_id, worker_id=worker_id))


def _failed(request_id: RequestId, worker_id: WorkerId, reason: str | None) -> Send:
    message = RequestFailed(
        request_id=request_id,
        reason=reason or "the pull failed",
        is_retryable=True,
        worker_id=worker_id,
    )
    return Send(CONTROLLER, message)
