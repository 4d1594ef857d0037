"""Carries out plans between pools of different shapes: read, verify, cut.

Blocks of the peer are read as they are into staging memory, some at a time so that they are still
in the cache when they are cut; their digests are compared there, since they are over the peer's
shape. Only then does a byte reach our pool. Owns the staging memory; knows no request and no peer
by name. `Agent` and `BlockMover` call it.
"""

from collections.abc import Iterable
from ctypes import pointer
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import KVLayout
from penstock.core.errors import BadRequest, BlocksCorrupt
from penstock.core.types import MIB, BlockId, Digest
from penstock.kv.tiers import RAW
from penstock.transfer.digest import disagree
from penstock.transfer.plan import cut
from penstock.transfer.region import Region, address_of
from penstock.transfer.reshape import Pieces, ReshapePlan, cut_staged
from penstock.transport.native.library import DTYPES, Cutting, Side, load_library
from penstock.transport.way import Source

Bytes1D = npt.NDArray[np.uint8]
STAGING_BYTES: Final = 2 * MIB
"""Staging memory, if one block is no larger."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What was read of a peer: whole blocks, in how many spans. Of what came encoded, the digests
    of our blocks in the order of the spans, and how long decoding took.
    """

    num_bytes: int
    num_spans: int
    codec: str = RAW
    digests: tuple[Digest, ...] = ()
    codec_ns: int = 0


class Reshaper:
    """Brings blocks of peers into pools of another shape; plans run at once have each its own
    staging memory, which is kept for the next.
    """

    def __init__(self, staging_bytes: int = STAGING_BYTES) -> None:
        self._staging_bytes = staging_bytes
        self._idle: list[Bytes1D] = []

    def carry_out(self, plan: ReshapePlan, source: Source, destination: Region) -> Carried:
        """Do what a plan says; blocks.

        Raises: `BadRequest` when the plan is not for these regions, before a byte is moved;
        `BlocksCorrupt` for a block with another digest, before it is cut; `PeerLost`,
        `DeadlineExceeded`. After an error the wanted slots hold nothing of use.
        """
        check(plan, source, destination)
        if plan.is_direct:
            spans = cut(plan.source_ids, plan.direct_ids)
            source.pull(destination, spans)
            _compare(destination, plan.direct_ids.tolist(), plan.digests)
            return Carried(len(plan.source_ids) * source.block_bytes, len(spans))
        num_spans = 0
        memory = self._take(source.block_bytes)
        num_blocks = len(memory) // source.block_bytes
        staged = Region(memory[: num_blocks * source.block_bytes].reshape(num_blocks, -1))
        for part, spans, pieces in plan.rounds(num_blocks):
            source.pull(staged, spans)
            _compare(staged, range(part.stop - part.start), plan.digests[part])
            _cut(plan, staged, destination, pieces)
            num_spans += len(spans)
        # Not after an error: a pull that was given up may still be writing.
        self._idle.append(memory)
        return Carried(len(plan.source_ids) * source.block_bytes, num_spans)

    def _take(self, block_bytes: int) -> Bytes1D:
        """Return memory that nobody else uses, for one block at least."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(self._staging_bytes, np.uint8)
        return memory if len(memory) >= block_bytes else np.empty(block_bytes, np.uint8)


def check(plan: ReshapePlan, source: Source, destination: Region) -> None:
    """Compare a plan with the memory that it is for, and change nothing. Raises: `BadRequest`."""
    our_ids = plan.direct_ids if plan.is_direct else plan.pieces[:, 2]
    for whose, memory, layout, block_ids in (
        ("the peer's", source, plan.theirs, plan.source_ids),
        ("our", destination, plan.ours, our_ids),
    ):
        block_bytes = layout.block_bytes[plan.group]
        if memory.block_bytes != block_bytes:
            raise BadRequest(f"{whose} blocks have {memory.block_bytes} bytes, not {block_bytes}")
        outside = block_ids[(block_ids < 0) | (block_ids >= memory.num_blocks)]
        if len(outside):
            raise BadRequest(f"block {outside[0]} is none of {whose} {memory.num_blocks}")


def _compare(region: Region, block_ids: Iterable[int], digests: tuple[Digest, ...]) -> None:
    """Raises: `BlocksCorrupt` when there are digests and they are not those of the blocks."""
    if disagree(region.blocks, map(BlockId, block_ids), digests):
        raise BlocksCorrupt("a block that was read has another digest than was offered")


def _cut(plan: ReshapePlan, staged: Region, destination: Region, pieces: Pieces) -> None:
    """Cut staged blocks into ours; without the interpreter lock, where there is a compiler."""
    library = load_library()
    if library is None:
        cut_staged(plan, staged.blocks, destination.blocks, pieces)
        return
    cutting = Cutting(
        theirs=_side(plan, plan.theirs, staged),
        ours=_side(plan, plan.ours, destination),
        num_planes=2 * plan.num_layers,
        num_heads=len(plan.kv_heads),
        head_dim=plan.ours.head_dim,
    )
    assert pieces.flags.c_contiguous, pieces.strides
    library.penstock_cut(pointer(cutting), address_of(pieces), len(pieces))


def _side(plan: ReshapePlan, layout: KVLayout, region: Region) -> Side:
    return Side(
        blocks=region.address,
        block_size=layout.block_size,
        num_heads=layout.num_kv_heads,
        first_head=plan.kv_heads.start - layout.first_kv_head,
        dtype=DTYPES.index(layout.dtype),
    )
