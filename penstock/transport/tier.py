"""Memory below a worker's pool: what every tier can do, and the tier in DRAM.

A tier is slots of one block each. Who decides which block lies in which slot is the worker core
(`worker/tiers.py`); this knows bytes, and `tier_mover.py` is its caller. `disk.py` is the same on a
file, `cxl.py` the same in a slower memory; `sibling.py` reads those of other workers.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from penstock.core.descriptors import RegionDescriptor
from penstock.core.tiers import KeptBlock
from penstock.core.types import BlockHash, Digest
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Region
from penstock.transport.shm import SharedPool, copy_spans


class Readable(Protocol):
    """Slots of `block_bytes` each. `kind` is how moves are to call it, emulation included."""

    kind: str
    num_slots: int
    block_bytes: int

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks. What cannot be read comes out as zeros: a digest shows it."""


@runtime_checkable
class TierStore(Readable, Protocol):
    """Slots that this worker alone writes."""

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        """Copy blocks into slots; names and digests are in the order of the spans.

        Raises: `OSError`; then none of the slots holds anything.
        """

    def contents(self) -> list[KeptBlock]:
        """Return what was there when the tier was opened."""

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a sibling needs to read the slots."""

    def close(self) -> None:
        """Let go of memory and files."""


class MemoryTier:
    """Slots in shared memory of this host; empty at first, pages are taken when first touched.

    Raises: `StartupFailed` when the system does not give the memory.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.kind = "dram"
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._pool = SharedPool(num_slots, block_bytes)

    @property
    def region(self) -> Region:
        """The slots, as memory."""
        return self._pool.region

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a sibling needs to map the slots."""
        return self._pool.descriptor

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        """Copy blocks into slots; memory remembers no name."""
        copy_spans(source, self.region, spans)

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks."""
        copy_spans(self.region, destination, spans)

    def pace(self, spans: SpanArray, started_ns: int) -> None:
        """Take as long as this memory would have, for who works in `region` itself."""

    def contents(self) -> list[KeptBlock]:
        """Return nothing: memory begins empty."""
        return []

    def close(self) -> None:
        """Let go of the memory."""
        self._pool.close()
