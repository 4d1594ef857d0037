"""`OfferDesk`: the prefill worker's half of the hand-off.

Owns the sequences whose KV is ready and whose blocks a decode worker may read. They keep their
blocks until that worker says `Release`, or is known to be dead: a cancelled offer is withdrawn,
never simply freed, because a one-sided read may be under way.
"""

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Offer, Offered, Send, Withdraw
from penstock.core.request import Request
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.worker.sequence import Sequence, SequenceState


class OfferDesk:
    """Offers finished prefills and takes their blocks back."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.offered: dict[RequestId, Sequence] = {}
        self._config = config
        self._kv = kv

    def offer(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Offer the KV of all tokens but the last to the sequence's decode worker."""
        assert sequence.decode_worker is not None
        assert sequence.num_computed == sequence.target_tokens, sequence.request_id
        sequence.move_to(SequenceState.OFFERED)
        sequence.timeline.offered_ns = now_ns
        self.offered[sequence.request_id] = sequence
        offer = Offer(
            request=self._continuation(sequence),
            source=self._config.worker_id,
            epoch=self._config.epoch,
            num_tokens=sequence.num_computed,
            groups=self._kv.offer(sequence.request_id, sequence.num_computed),
            timeline=sequence.timeline,
        )
        offered = Offered(request_id=sequence.request_id, worker_id=self._config.worker_id)
        return [Send(sequence.decode_worker, offer), Send(CONTROLLER, offered)]

    def withdraw(self, sequence: Sequence) -> list[Command]:
        """Ask for the blocks back; they are freed when the decode worker answers."""
        if sequence.state is SequenceState.CLOSING:
            return []
        assert sequence.decode_worker is not None
        sequence.move_to(SequenceState.CLOSING)
        message = Withdraw(request_id=sequence.request_id, source=self._config.worker_id)
        return [Send(sequence.decode_worker, message)]

    def release(self, request_id: RequestId) -> Sequence | None:
        """Take an offer's blocks back; they stay as prefix cache. Returns None when it was released
        before.
        """
        sequence = self.offered.pop(request_id, None)
        if sequence is not None:
            self._kv.close(request_id)
            sequence.move_to(SequenceState.GONE)
        return sequence

    def release_all_of(self, worker_id: WorkerId) -> list[Sequence]:
        """Take back everything that was offered to a worker that is gone."""
        lost = [s for s in self.offered.values() if s.decode_worker == worker_id]
        return [s for s in lost if self.release(s.request_id)]

    @staticmethod
    def _continuation(sequence: Sequence) -> Request:
        # A prefill worker never samples, so what it was given is what the decode worker continues.
        assert len(sequence.tokens) == sequence.request.num_tokens
        return sequence.request
