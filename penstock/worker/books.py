"""What must be true of a worker's sequences, whatever has happened; `Worker.check` asks."""

from collections.abc import Iterable

from penstock.kv.cache import KVCache
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence, SequenceState


def check_sequences(
    sequences: Iterable[Sequence], kv: KVCache, scheduler: Scheduler, num_fetches: int = 0
) -> None:
    """Assert that the cache knows who holds blocks, and that both lines hold whom they may.

    `num_fetches` are held for what comes from tiers, not for a sequence.
    """
    holders = {s.request_id for s in sequences if s.state is not SequenceState.WAITING}
    assert len(holders) + num_fetches == kv.num_requests, (holders, num_fetches, kv.num_requests)
    for sequence in scheduler.running:
        assert sequence.state is SequenceState.RUNNING, (sequence.request_id, sequence.state)
        assert sequence.num_computed <= sequence.capacity_tokens, sequence.request_id
    for sequence in scheduler.waiting:
        assert sequence.state is SequenceState.WAITING, (sequence.request_id, sequence.state)
