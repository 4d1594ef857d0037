"""Tiers of simulated workers: slots with bytes, moves that take time, and what goes wrong there.

Siblings read each other's slots as they are at that moment, named so or not. Slots on disk outlive
their worker, with what was written of them to the end. As between workers,
bytes are copied at the time at which a move lands, so that a block or a slot that was given away
too early is caught with the wrong content. `sim/run.py` makes them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.core.events import Move, MoveDone, Span
from penstock.core.tiers import KeptBlock, TierConfig
from penstock.core.types import NO_DIGEST, BlockHash, BlockId, Digest
from penstock.kv.tiers import RAW, Tier
from penstock.sim.clock import SimClock
from penstock.transfer.digest import take_digests
from penstock.transfer.region import Bytes2D

CODE = np.uint8(0x5A)
"""What the codec of a lossy tier does to every byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimTier:
    """A tier of every worker: its size, what a move costs, and what goes wrong, as probabilities.

    A move down fails (the disk is full), a move up fails (the disk is gone), one of its blocks
    comes with a flipped bit. Slots of a lossy tier hold encoded blocks and are known by digests of
    what they hold; the codec gives back what went in, so that every later token tells of a mistake.
    """

    name: str
    num_slots: int
    latency_ns: int = 10_000
    bytes_per_s: int = 10_000_000_000
    write_failure: float = 0.0
    read_failure: float = 0.0
    corruption: float = 0.0
    is_lossy: bool = False

    @property
    def codec(self) -> str:
        """What its slots are in."""
        return "coded" if self.is_lossy else RAW


@dataclass(slots=True, eq=False)
class Slots:
    """What a tier holds: bytes, and of what has arrived whole, the names and digests."""

    blocks: Bytes2D
    records: dict[int, tuple[BlockHash, Digest]] = field(default_factory=dict)

    def kept(self) -> tuple[KeptBlock, ...]:
        """Return what a worker finds here when it starts; of two with one name the first."""
        first: dict[BlockHash, KeptBlock] = {}
        for slot, (name, digest) in sorted(self.records.items()):
            first.setdefault(name, KeptBlock(slot, name, digest))
        return tuple(first.values())


class SimTiers:
    """The tiers of one worker during one life, and the moves between them and its pool."""

    def __init__(
        self, specs: Sequence[SimTier], slots: dict[str, Slots], clock: SimClock, rng: random.Random
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._slots = slots
        self._clock = clock
        self._rng = rng

    def configs(self) -> tuple[TierConfig, ...]:
        """Return what the worker core is to know of them."""
        return tuple(
            TierConfig(
                name=spec.name,
                num_slots=spec.num_slots,
                bytes_per_s=spec.bytes_per_s,
                latency_ns=spec.latency_ns,
                kept=self._slots[spec.name].kept(),
                codec=spec.codec,
                is_lossy=spec.is_lossy,
            )
            for spec in self._specs.values()
        )

    def submit(
        self,
        pool: Bytes2D,
        move: Move,
        is_alive: Callable[[], bool],
        done: Callable[[MoveDone], None],
        *,
        owner: "Callable[[], SimTiers | None]",
    ) -> None:
        """Carry a move out when its time is over; one out of a tier reads that of `owner`, if there
        is one by then.
        """
        (spans,), ends = move.spans, move.tiers
        assert ends is not None, move
        spec = self._specs[ends.source or ends.destination]
        started_ns = self._clock.now_ns()
        num_bytes = sum(span.num_blocks for span in spans) * pool.shape[1]
        took_ns = spec.latency_ns + num_bytes * 1_000_000_000 // spec.bytes_per_s
        if ends.destination:
            for _, slot in _pairs(spans):
                self._slots[ends.destination].records.pop(slot, None)

        def land() -> None:
            if not is_alive():
                return
            digests: tuple[tuple[Digest, ...], ...] = ()
            if ends.destination:
                error, landed = self._write(pool, move)
                digests = (landed,)
            elif (tiers := owner()) is None or self._rng.random() < spec.read_failure:
                error = f"{ends.source} of {move.source} cannot be read"
            else:
                error = None
                digests = (self._read(pool, spec, move, tiers._slots[ends.source]),)
            done(
                MoveDone(
                    move_id=move.move_id,
                    num_bytes=num_bytes,
                    num_spans=len(spans),
                    transport="sim",
                    started_ns=started_ns,
                    finished_ns=self._clock.now_ns(),
                    error=error,
                    digests=digests,
                )
            )

        self._clock.call_at(started_ns + took_ns, land)

    def _write(self, pool: Bytes2D, move: Move) -> tuple[str | None, tuple[Digest, ...]]:
        """Return what went wrong, and by what the slots are to be known."""
        (spans,), (digests,), ends = move.spans, move.digests, move.tiers
        assert ends is not None, move
        if self._rng.random() < self._specs[ends.destination].write_failure:
            return f"no space left on {ends.destination}", ()
        source = self._slots[ends.source].blocks if ends.source else pool
        was_coded = bool(ends.source) and self._specs[ends.source].is_lossy
        is_coded = self._specs[ends.destination].is_lossy
        into = self._slots[ends.destination]
        landed = []
        for (block, slot), name, digest in zip(_pairs(spans), ends.names, digests, strict=True):
            into.blocks[slot] = source[block] ^ CODE if was_coded != is_coded else source[block]
            if was_coded or is_coded:
                (digest,) = take_digests(into.blocks, [BlockId(slot)])
            into.records[slot] = (name, digest)
            landed.append(digest)
        return None, tuple(landed)

    def _read(self, pool: Bytes2D, spec: SimTier, move: Move, slots: Slots) -> tuple[Digest, ...]:
        (spans,), (wanted,) = move.spans, move.digests
        pairs = _pairs(spans)
        for slot, block in pairs:
            pool[block] = slots.blocks[slot]
        if self._rng.random() < spec.corruption:
            pool[self._rng.choice(pairs)[1], 0] ^= np.uint8(1)
        blocks = [BlockId(block) for _, block in pairs]
        found = take_digests(pool, blocks)
        if not spec.is_lossy:
            return found
        # Compared before it is decoded, as `transport/coded.py` does.
        is_right = [a == b for a, b in zip(found, wanted, strict=True)]
        pool[blocks] ^= CODE
        content = take_digests(pool, blocks)
        return tuple(c if r else NO_DIGEST for c, r in zip(content, is_right, strict=True))


def make_slots(
    specs: Sequence[SimTier], block_bytes: int, before: dict[str, Slots]
) -> dict[str, Slots]:
    """Return the slots of a worker that starts: those on disk are as they were `before`."""
    return {
        spec.name: before[spec.name]
        if spec.name == Tier.DISK.value and before
        else Slots(np.zeros((spec.num_slots, block_bytes), np.uint8))
        for spec in specs
    }


def _pairs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(s.source + i, s.destination + i) for s in spans for i in range(s.num_blocks)]
