"""The mover between a worker's pool and the tiers below it, and between two tiers.

It carries out what a `Move` says and takes the digests of what an onboard has brought, which the
worker core compares. It decides nothing and keeps nothing; the composition root calls `execute` for
moves that name a tier, on a thread for each pair of tiers.
"""

import time
from collections.abc import Callable, Mapping

from penstock.core.events import Move, MoveDone, TierEnds
from penstock.core.types import BlockId, Digest
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray, span_array
from penstock.transfer.region import Region, bounds_error
from penstock.transport.tier import MemoryTier, TierStore


class TierMover:
    """Copies blocks of the one KV group between `pool` and `tiers`, by their names."""

    def __init__(
        self,
        pool: Region,
        tiers: Mapping[str, TierStore],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._clock = clock

    def execute(self, move: Move) -> MoveDone:
        """Carry out a move; blocks until it is done. A disk that fails is an `error`."""
        started_ns = self._clock()
        (listed,), ends = move.spans, move.tiers
        assert ends is not None, f"move {move.move_id} is for the block mover"
        spans = span_array(listed)
        wrong = bounds_error(
            spans,
            source_blocks=self._num_blocks(ends.source),
            destination_blocks=self._num_blocks(ends.destination),
        )
        assert wrong is None, f"move {move.move_id}: {wrong}"
        error = None
        try:
            digests = self._copy(ends, move.digests, spans)
        except OSError as failure:
            digests, error = (), str(failure)
        num_blocks = int(spans[:, 2].sum())
        return MoveDone(
            move_id=move.move_id,
            num_bytes=num_blocks * self._pool.block_bytes,
            num_spans=len(spans),
            transport=self._tiers[ends.source or ends.destination].kind,
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
            digests=digests,
        )

    def _copy(
        self, ends: TierEnds, expected: tuple[tuple[Digest, ...], ...], spans: SpanArray
    ) -> tuple[tuple[Digest, ...], ...]:
        """Copy, and return the digests of what is in the pool now. Raises: `OSError`."""
        if ends.destination:
            source = self._memory(ends.source)
            self._tiers[ends.destination].write(source, spans, ends.names, *expected)
            return ()
        self._tiers[ends.source].read(self._pool, spans)
        landed = [BlockId(to + i) for _, to, count in spans.tolist() for i in range(count)]
        return (take_digests(self._pool.blocks, landed),)

    def _memory(self, tier: str) -> Region:
        """Return what can be written from: the pool, or a tier that is memory itself."""
        if not tier:
            return self._pool
        store = self._tiers[tier]
        assert isinstance(store, MemoryTier), f"nothing sinks out of {store.kind}"
        return store.region

    def _num_blocks(self, tier: str) -> int:
        return self._tiers[tier].num_slots if tier else self._pool.num_blocks
