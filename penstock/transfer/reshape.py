"""Tokens between pools of different shapes: which blocks to read, and how to cut them into ours.

Blocks of another size, dtype or share of the KV heads cannot be copied into their places. They are
read as they are into staging memory, where the peer's digests hold, and cut from there into pieces:
the tokens that one staged block and one of our blocks have in common. Blocks of the same shape take
the short way, spans as `plan.py` makes them: `plan_reshape` chooses.

Knows numbers and arrays, neither peers nor requests. `transport/reshape.py` carries plans out;
`cut_staged` is what its native form does, in numpy, and what the simulator uses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import KVLayout
from penstock.core.errors import BadRequest
from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.core.types import BlockId, Digest
from penstock.transfer.plan import SpanArray, as_array, cut
from penstock.transfer.region import Bytes2D

Int64 = npt.NDArray[np.int64]
Pieces = npt.NDArray[np.int64]
"""Cuts, [num_pieces, 5]: staged block, slot in it, our block, slot in it, number of tokens."""
Stored = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

_STORED: Final = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


@dataclass(frozen=True, slots=True, eq=False)
class ReshapePlan:
    """How wanted tokens of a group come from `theirs` to `ours`.

    Source block `source_ids[i]`, whose digest is `digests[i]` if there are digests, becomes staged
    block i. A direct plan has no pieces: `source_ids[i]` goes into our block `direct_ids[i]`.
    """

    theirs: KVLayout
    ours: KVLayout
    group: int
    source_ids: Int64
    digests: tuple[Digest, ...]
    pieces: Pieces
    direct_ids: Int64

    @property
    def is_direct(self) -> bool:
        """True when blocks are copied as they are."""
        return len(self.direct_ids) > 0

    @property
    def num_layers(self) -> int:
        """Number of layers in the group."""
        return len(self.ours.groups[self.group].layers)

    @property
    def kv_heads(self) -> range:
        """The model's KV heads that cross: those that both sides hold."""
        return _shared_heads(self.theirs, self.ours)

    def rounds(self, num_staged: int) -> Iterator[tuple[slice, SpanArray, Pieces]]:
        """Cut the plan so that staging memory of `num_staged` blocks is enough.

        Each round says which of `source_ids` it reads, by which spans, and how it is cut; its
        staged blocks count from 0.
        """
        for start in range(0, len(self.source_ids), num_staged):
            part = slice(start, min(start + num_staged, len(self.source_ids)))
            spans = cut(self.source_ids[part], np.arange(part.stop - start))
            first, last = np.searchsorted(self.pieces[:, 0], (start, part.stop))
            yield part, spans, self.pieces[first:last] - (start, 0, 0, 0, 0)


def plan_reshape(theirs: KVLayout, ours: KVLayout, group: int, wanted: Reshape) -> ReshapePlan:
    """Plan the way of `wanted` out of a peer's blocks in group `group` into ours.

    Written are its tokens, in the heads that both sides hold, and nothing else; save that a direct
    plan fills its last block. Ten thousand blocks take about a millisecond.
    Raises: `BadRequest` when the layouts do not go together or the blocks do not hold the tokens,
    `OverflowError` for numbers that are no blocks. Whether they are in the pools is not known here.
    """
    refusal = ours.incompatibility(theirs)
    if refusal is not None:
        raise BadRequest(refusal)
    if not _shared_heads(theirs, ours):
        raise BadRequest(f"KV heads {theirs.kv_heads} there, {ours.kv_heads} here: none in common")
    if not 0 <= wanted.begin <= wanted.end:
        raise BadRequest(f"tokens {wanted.begin} to {wanted.end} are none")
    used = _used(wanted.source, wanted, theirs.block_size)
    our_used = _used(wanted.destination, wanted, ours.block_size)
    source_ids = as_array(wanted.source.block_ids[used])
    our_ids = as_array(wanted.destination.block_ids[our_used])
    pieces = _cut_tokens(wanted, theirs.block_size, ours.block_size)
    is_direct = _is_same_shape(theirs, ours) and wanted.begin % ours.block_size == 0
    if not is_direct:
        pieces[:, 0] -= wanted.source.first + used.start
        pieces[:, 2] = our_ids[pieces[:, 2] - wanted.destination.first - our_used.start]
    return ReshapePlan(
        theirs=theirs,
        ours=ours,
        group=group,
        source_ids=source_ids,
        digests=wanted.source.digests[used],
        pieces=pieces[:0] if is_direct else pieces,
        direct_ids=our_ids if is_direct else our_ids[:0],
    )


def whole_blocks(wanted: Reshape, block_size: int) -> tuple[BlockId, ...]:
    """Return those of our blocks of which every slot is written."""
    first = -(-wanted.begin // block_size) - wanted.destination.first
    return wanted.destination.block_ids[first : wanted.end // block_size - wanted.destination.first]


def cut_staged(plan: ReshapePlan, staged: Bytes2D, ours: Bytes2D, pieces: Pieces) -> None:
    """Cut staged blocks into ours, both [num_blocks, block_bytes] uint8; rounds to nearest even."""
    from_heads = _place(plan.kv_heads, plan.theirs)
    to_heads = _place(plan.kv_heads, plan.ours)
    source = _view(staged, plan.theirs, plan.num_layers)
    destination = _view(ours, plan.ours, plan.num_layers)
    for block, slot, our_block, our_slot, count in pieces.tolist():
        tokens = source[block, :, slot : slot + count, from_heads]
        destination[our_block, :, our_slot : our_slot + count, to_heads] = convert(
            tokens, plan.theirs.dtype, plan.ours.dtype
        )


def convert(values: Stored, source: str, destination: str) -> Stored:
    """Return values of dtype `source` as `destination`, rounded to nearest even.

    bfloat16 is held as its bits, in uint16. What is too large for float16 becomes infinite.
    """
    if source == destination:
        return values
    if source == "bfloat16":
        exact = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        exact = values.astype(np.float32)
    if destination == "bfloat16":
        bits = exact.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of a NaN's bits would make another number of it.
        return np.where(np.isnan(exact), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    with np.errstate(over="ignore"):
        return exact.astype(_STORED[destination])


def _is_same_shape(theirs: KVLayout, ours: KVLayout) -> bool:
    mine = (ours.block_size, ours.dtype, ours.kv_heads)
    return (theirs.block_size, theirs.dtype, theirs.kv_heads) == mine


def _shared_heads(theirs: KVLayout, ours: KVLayout) -> range:
    start = max(theirs.first_kv_head, ours.first_kv_head)
    return range(start, min(theirs.kv_heads.stop, ours.kv_heads.stop))


def _place(heads: range, layout: KVLayout) -> slice:
    """Return where heads lie in the blocks of a layout."""
    return slice(heads.start - layout.first_kv_head, heads.stop - layout.first_kv_head)


def _used(blocks: GroupBlocks, wanted: Reshape, block_size: int) -> slice:
    """Return which of `blocks` the wanted tokens lie in. Raises: `BadRequest` when they do not."""
    if wanted.begin == wanted.end:
        return slice(0, 0)
    start = wanted.begin // block_size - blocks.first
    stop = -(-wanted.end // block_size) - blocks.first
    if start < 0 or stop > len(blocks.block_ids):
        raise BadRequest(
            f"tokens {wanted.begin} to {wanted.end} are not in {len(blocks.block_ids)} blocks "
            f"of {block_size} from entry {blocks.first} on"
        )
    if blocks.digests and len(blocks.digests) != len(blocks.block_ids):
        raise BadRequest(f"{len(blocks.digests)} digests for {len(blocks.block_ids)} blocks")
    return slice(start, stop)


def _cut_tokens(wanted: Reshape, block_size: int, our_block_size: int) -> Pieces:
    """Cut the wanted tokens where a block of either size begins; blocks are entries of a table."""
    step = gcd(block_size, our_block_size)
    grid = np.arange(wanted.begin // step * step, wanted.end, step)
    grid = grid[: wanted.end - wanted.begin]  # no tokens are no pieces
    starts = np.maximum(grid, wanted.begin)
    pieces = np.empty((len(grid), 5), np.int64)
    for column, size in ((0, block_size), (2, our_block_size)):
        entries = starts // size  # with the product below five times as fast as divmod
        pieces[:, column], pieces[:, column + 1] = entries, starts - entries * size
    pieces[:, 4] = np.minimum(grid + step, wanted.end) - starts
    return pieces


def _view(blocks: Bytes2D, layout: KVLayout, num_layers: int) -> Stored:
    """View blocks as [num_blocks, layers * 2, block_size, num_kv_heads, head_dim]."""
    shape = (-1, 2 * num_layers, layout.block_size, layout.num_kv_heads, layout.head_dim)
    values: Stored = blocks.view(_STORED[layout.dtype]).reshape(shape)
    return values
