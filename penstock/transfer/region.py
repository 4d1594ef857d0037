"""Registered memory: the local handle, and the checks before a byte of a peer's is touched.

A `Region` is memory of this process and is never sent; a `core.events.RegionDescriptor` is what a
peer may know of it. The transports make and use both; nothing here maps or copies.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.descriptors import Endpoint, RegionDescriptor
from penstock.core.events import Span
from penstock.core.types import BlockId
from penstock.transfer.plan import SpanArray

Bytes2D = npt.NDArray[np.uint8]
_FEW: Final = 16
"""Up to so many spans a loop is faster than numpy."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One group's pool in this process: `blocks` is [num_blocks, block_bytes] uint8, contiguous."""

    blocks: Bytes2D
    address: int = field(init=False)
    """Where the first block lies in this process."""

    def __post_init__(self) -> None:
        """Assert that a block is one contiguous span."""
        assert self.blocks.ndim == 2, self.blocks.shape
        assert self.blocks.flags.c_contiguous, self.blocks.strides
        object.__setattr__(self, "address", address_of(self.blocks))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return int(self.blocks.shape[0])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(self.blocks.shape[1])

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.blocks.nbytes


def address_of(array: npt.NDArray[np.uint8] | SpanArray) -> int:
    """Return where an array's first element lies."""
    address: int = array.ctypes.data
    return address


class PeerMemory(Struct, frozen=True):
    """All that a peer may know of this process's memory; `epoch` is new for every incarnation.

    Where there is a `layout`, region g holds the blocks of its group g.
    """

    name: str
    epoch: int
    regions: tuple[RegionDescriptor, ...]
    endpoints: tuple[Endpoint, ...] = ()
    layout: KVLayout | None = None


def described_blocks(descriptor: RegionDescriptor) -> int:
    """Return how many whole blocks a descriptor covers."""
    return descriptor.capacity_bytes // descriptor.block_bytes if descriptor.block_bytes > 0 else 0


def bounds_error(spans: SpanArray, *, source_blocks: int, destination_blocks: int) -> str | None:
    """Return what is wrong with the first bad span, or None when all lie inside both regions.

    Spans come from a peer's message: they are checked here, once, and trusted by the copy.
    """
    rows = (
        spans.tolist()
        if len(spans) <= _FEW
        else _suspects(spans, source_blocks, destination_blocks)
    )
    for source, destination, count in rows:
        is_span = count > 0 and source >= 0 and destination >= 0
        is_inside = source + count <= source_blocks and destination + count <= destination_blocks
        if is_span and is_inside:
            continue
        span = Span(BlockId(source), BlockId(destination), count)
        if not is_span:
            return f"{span} is not a span"
        if source + count > source_blocks:
            return f"{span} leaves the source, which has {source_blocks} blocks"
        return f"{span} leaves the destination, which has {destination_blocks} blocks"
    return None


def _suspects(spans: SpanArray, source_blocks: int, destination_blocks: int) -> list[list[int]]:
    """Return the first span that is not inside, if any; in an order in which nothing overflows."""
    source, destination, count = spans.T
    is_bad = (source < 0) | (destination < 0) | (count <= 0)
    is_bad |= (source > source_blocks - count) | (destination > destination_blocks - count)
    found: list[list[int]] = spans[np.flatnonzero(is_bad)[:1]].tolist()
    return found
