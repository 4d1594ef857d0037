"""The mover between a worker's pool and the tiers below it, and between two tiers.

It carries out what a `Move` says and takes the digests of what an onboard has brought, which the
worker core compares. It decides nothing and keeps nothing; the composition root calls `execute` for
moves that name a tier, on a thread for each pair of tiers.
"""

import time
from collections.abc import Callable, Mapping

from penstock.core.errors import PeerLost
from penstock.core.events import Move, MoveDone
from penstock.core.types import BlockId, Digest
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray, span_array
from penstock.transfer.region import Region, bounds_error
from penstock.transport.sibling import Readable, SiblingTiers
from penstock.transport.tier import MemoryTier, TierStore


class TierMover:
    """Copies blocks of the one KV group between `pool` and `tiers`, by their names, and out of
    those of `siblings`.
    """

    def __init__(
        self,
        pool: Region,
        tiers: Mapping[str, TierStore],
        clock: Callable[[], int] = time.monotonic_ns,
        siblings: SiblingTiers | None = None,
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._clock = clock
        self._siblings = siblings

    def execute(self, move: Move) -> MoveDone:
        """Carry out a move; blocks until it is done. A disk that fails, or a sibling that is gone,
        is an `error`.
        """
        started_ns = self._clock()
        (listed,), ends = move.spans, move.tiers
        assert ends is not None, f"move {move.move_id} is for the block mover"
        spans = span_array(listed)
        error, kind = None, "none"
        digests: tuple[tuple[Digest, ...], ...] = ()
        try:
            if ends.destination:
                kind = self._write(move, spans)
            else:
                kind = self._read(move, spans)
                landed = [BlockId(to + i) for _, to, count in spans.tolist() for i in range(count)]
                digests = (take_digests(self._pool.blocks, landed),)
        except (OSError, PeerLost) as failure:
            error = str(failure)
        return MoveDone(
            move_id=move.move_id,
            num_bytes=int(spans[:, 2].sum()) * self._pool.block_bytes,
            num_spans=len(spans),
            transport=kind,
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
            digests=digests,
        )

    def _write(self, move: Move, spans: SpanArray) -> str:
        """Copy into a tier of ours. Raises: `OSError`."""
        ends = move.tiers
        assert ends is not None, move.move_id
        source, tier = self._memory(ends.source), self._tiers[ends.destination]
        wrong = bounds_error(
            spans, source_blocks=source.num_blocks, destination_blocks=tier.num_slots
        )
        assert wrong is None, f"move {move.move_id}: {wrong}"
        tier.write(source, spans, ends.names, *move.digests)
        return tier.kind

    def _read(self, move: Move, spans: SpanArray) -> str:
        """Copy out of a tier, ours or a sibling's. Raises: `OSError`, `PeerLost`."""
        tier = self._tier(move)
        wrong = bounds_error(
            spans, source_blocks=tier.num_slots, destination_blocks=self._pool.num_blocks
        )
        if wrong is not None:
            assert not self._is_ours(move), f"move {move.move_id}: {wrong}"
            raise PeerLost(f"{tier.kind} of {move.source}: {wrong}")
        tier.read(self._pool, spans)
        return tier.kind

    def _tier(self, move: Move) -> Readable:
        assert move.tiers is not None, move.move_id
        if self._siblings is None or self._is_ours(move):
            return self._tiers[move.tiers.source]
        return self._siblings.find(move.source, move.epoch, move.tiers.source)

    def _is_ours(self, move: Move) -> bool:
        return self._siblings is None or move.source == self._siblings.worker_id

    def _memory(self, tier: str) -> Region:
        """Return what can be written from: the pool, or a tier that is memory itself."""
        if not tier:
            return self._pool
        store = self._tiers[tier]
        assert isinstance(store, MemoryTier), f"nothing sinks out of {store.kind}"
        return store.region
