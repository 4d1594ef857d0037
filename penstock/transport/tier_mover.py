"""The mover between a worker's pool and the tiers below it, and between two tiers.

It carries out what a `Move` says and takes the digests of what an onboard has brought, which the
worker core compares. It decides nothing and keeps nothing; the composition root calls `execute` for
moves that name a tier, on a thread for each pair of tiers.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from penstock.core.errors import PeerLost
from penstock.core.events import Move, MoveDone, TierEnds
from penstock.core.types import BlockId, Digest
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray, span_array
from penstock.transfer.region import Region, bounds_error
from penstock.transport.coded import CodedTier, Copied, transcode
from penstock.transport.sibling import SiblingTiers
from penstock.transport.tier import MemoryTier, Readable, TierStore

OpenTier = TierStore | CodedTier
"""What a mover has for a tier: slots as they are, or by way of a codec."""
Reads = Readable | CodedTier
"""The same of a tier that may be another worker's."""


class TierMover:
    """Copies blocks of the one KV group between `pool` and `tiers`, by their names, and out of
    those of `siblings`.
    """

    def __init__(
        self,
        pool: Region,
        tiers: Mapping[str, OpenTier],
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
        error, copied = None, Copied(())
        tier: Reads | None = None
        try:
            tier = self._tier(move)
            copied = self._copy(move, tier, spans)
        except (OSError, PeerLost) as failure:
            error = str(failure)
        block_bytes = tier.block_bytes if tier else self._pool.block_bytes
        return MoveDone(
            move_id=move.move_id,
            num_bytes=int(spans[:, 2].sum()) * block_bytes,
            num_spans=len(spans),
            transport=tier.kind if tier else "none",
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
            digests=() if error else (copied.digests,),
            codec_ns=copied.codec_ns,
        )

    def _tier(self, move: Move) -> Reads:
        """Return the tier that is read, or written out of the pool. Raises: `PeerLost`."""
        ends = move.tiers
        assert ends is not None, move.move_id
        if ends.destination or self._siblings is None or move.source == self._siblings.worker_id:
            return self._tiers[ends.source or ends.destination]
        return self._siblings.find(move.source, move.epoch, ends.source)

    def _copy(self, move: Move, tier: Reads, spans: SpanArray) -> Copied:
        """Copy, and say what is where it was to go to now. Raises: `OSError`, `PeerLost`."""
        ends = move.tiers
        assert ends is not None, move.move_id
        (digests,) = move.digests or ((),)
        wrong = bounds_error(
            spans,
            source_blocks=tier.num_slots if ends.source else self._pool.num_blocks,
            destination_blocks=self._num_blocks(ends.destination),
        )
        if wrong is not None:
            assert tier not in self._tiers.values(), f"move {move.move_id}: {wrong}"
            raise PeerLost(f"{tier.kind} of {move.source}: {wrong}")
        if ends.destination:
            return self._write(ends, digests, spans)
        if isinstance(tier, CodedTier):
            return tier.read(self._pool, spans, digests)
        tier.read(self._pool, spans)
        landed = [BlockId(to + i) for _, to, count in spans.tolist() for i in range(count)]
        return Copied(take_digests(self._pool.blocks, landed))

    def _write(self, ends: TierEnds, digests: Sequence[Digest], spans: SpanArray) -> Copied:
        """Write out of the pool, or let sink from one tier into another. Raises: `OSError`."""
        into = self._tiers[ends.destination]
        out_of = self._tiers[ends.source] if ends.source else None
        if isinstance(out_of, CodedTier):
            if not isinstance(into, CodedTier) or not _are_alike(out_of, into):
                return transcode(out_of, into, spans, ends.names, digests)
            # What is encoded already sinks as it is.
            into, out_of = into.store, out_of.store
        source = self._pool if out_of is None else _memory(out_of)
        if isinstance(into, CodedTier):
            return into.write(source, spans, ends.names, digests)
        into.write(source, spans, ends.names, digests)
        return Copied(tuple(digests))

    def _num_blocks(self, tier: str) -> int:
        return self._tiers[tier].num_slots if tier else self._pool.num_blocks


def _are_alike(one: CodedTier, other: CodedTier) -> bool:
    """Tell whether the slots of two tiers hold the same bytes for a block."""
    return one.codec.name == other.codec.name and one.block_bytes == other.block_bytes


def _memory(tier: OpenTier) -> Region:
    """Return the slots of a tier that is memory itself."""
    assert isinstance(tier, MemoryTier), f"nothing sinks out of {tier.kind}"
    return tier.region
