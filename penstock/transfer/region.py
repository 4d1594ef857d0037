"""Registered memory: the local handle, and the checks before a byte of a peer's is touched.

A `Region` is memory of this process and is never sent; a `core.events.RegionDescriptor` is what a
peer may know of it. The transports make and use both; nothing here maps or copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.events import RegionDescriptor, Span

Bytes2D = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One group's pool in this process: `blocks` is [num_blocks, block_bytes] uint8, contiguous."""

    blocks: Bytes2D

    def __post_init__(self) -> None:
        """Assert that a block is one contiguous span."""
        assert self.blocks.ndim == 2, self.blocks.shape
        assert self.blocks.flags.c_contiguous, self.blocks.strides

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


def described_blocks(descriptor: RegionDescriptor) -> int:
    """Return how many whole blocks a descriptor covers."""
    return descriptor.capacity_bytes // descriptor.block_bytes if descriptor.block_bytes > 0 else 0


def bounds_error(
    spans: Sequence[Span], *, source_blocks: int, destination_blocks: int
) -> str | None:
    """Return what is wrong with the first bad span, or None when all lie inside both regions.

    Spans come from a peer's message: they are checked here, once, and trusted by the copy.
    """
    for span in spans:
        if span.num_blocks <= 0 or span.source < 0 or span.destination < 0:
            return f"{span} is not a span"
        if span.source + span.num_blocks > source_blocks:
            return f"{span} leaves the source, which has {source_blocks} blocks"
        if span.destination + span.num_blocks > destination_blocks:
            return f"{span} leaves the destination, which has {destination_blocks} blocks"
    return None
