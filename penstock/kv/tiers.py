"""The words of the memory hierarchy: tiers, links between them, and codecs with what they cost.

Owns the constants that a decision weighs. It knows no block, no queue and no time. Everything else
of the KV orchestrator imports it; a worker or a simulated machine fills the structs in, from flags,
measurements or a published table.

Costs are what one operation takes on an idle link or engine; how long the queue before it is, is
`kv/dma.py`'s and `kv/compression.py`'s to say.
"""

from collections.abc import Hashable
from enum import Enum
from math import ceil
from typing import Final

from msgspec import Struct

BlockKey = Hashable
"""What names a block: a `BlockHash` in a worker, a number in a simulation."""

RAW: Final = "raw"
"""The codec that leaves a block as it is."""


class Tier(Enum):
    """A place for blocks, fastest first. STAGING is the small memory right before compute."""

    STAGING = "staging"
    HBM = "hbm"
    CXL = "cxl"
    DRAM = "dram"
    DISK = "disk"

    # Members are single objects; Enum's own hash is a call into Python, a million times a second.
    __hash__ = object.__hash__


class TierSpec(Struct, frozen=True, kw_only=True):
    """How much a tier holds."""

    tier: Tier
    capacity_bytes: int


class LinkSpec(Struct, frozen=True, kw_only=True):
    """A way from one tier to another.

    A descriptor costs `latency_ns` once, whatever the number of adjacent blocks in it, and its
    bytes at `bytes_per_ns`. `num_queues` descriptors may be under way: their latencies overlap,
    their bytes do not.
    """

    source: Tier
    destination: Tier
    latency_ns: float
    bytes_per_ns: float
    num_queues: int = 1

    @property
    def ends(self) -> tuple[Tier, Tier]:
        """The pair of tiers, by which a link is named."""
        return self.source, self.destination

    def bytes_ns(self, num_bytes: int) -> float:
        """Return how long the link is occupied by the bytes alone."""
        return num_bytes / self.bytes_per_ns

    def duration_ns(self, num_bytes: int) -> int:
        """Return how long one descriptor takes alone, rounded up."""
        return ceil(self.latency_ns + self.bytes_ns(num_bytes))


class CodecSpec(Struct, frozen=True, kw_only=True):
    """A way to store a block in fewer bytes; every block has the same encoded size.

    `loss` is what the quality budget is compared with: the relative increase of held-out loss that
    was measured for it, 0 for a lossless codec. Times are those of one block on one lane.
    """

    name: str
    block_bytes: int
    encode_ns: int = 0
    decode_ns: int = 0
    loss: float = 0.0


Link = tuple[Tier, Tier]
