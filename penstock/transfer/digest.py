"""Digests of blocks: what makes a wrong byte visible.

Taken by the owner when a block's content is complete, and by the reader of what it has copied. 64
bits of xxh3: an accident goes unnoticed once in 2^64; it is no defence against an author of bytes.

Source: XXH3 (Yann Collet), by the xxhash package.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from xxhash import xxh3_64_intdigest

from penstock.core.events import Move
from penstock.core.types import NO_DIGEST, BlockId, Digest
from penstock.transfer.region import Bytes2D

TakeDigests = Callable[[Sequence[BlockId]], tuple[Digest, ...]]
"""Digests of the named blocks of one pool, wherever its memory is."""


def take_digests(blocks: Bytes2D, block_ids: Iterable[BlockId]) -> tuple[Digest, ...]:
    """Return the digest of each block; `blocks` is [num_blocks, block_bytes] uint8, contiguous."""
    return tuple(Digest(xxh3_64_intdigest(blocks[i].data) or ~NO_DIGEST) for i in block_ids)


def disagree(blocks: Bytes2D, block_ids: Iterable[BlockId], digests: Iterable[Digest]) -> bool:
    """Tell whether a block is not what its digest says; where none was taken, none is compared."""
    return any(
        digest != NO_DIGEST and take_digests(blocks, (block_id,))[0] != digest
        for block_id, digest in zip(block_ids, digests, strict=False)
    )


def is_corrupt(move: Move, pools: Sequence[Bytes2D]) -> bool:
    """Tell whether what a move has put into our `pools` is not what its digests say."""
    return is_corrupt_by(move, [partial(take_digests, blocks) for blocks in pools])


def is_corrupt_by(move: Move, takes: Iterable[TakeDigests]) -> bool:
    """Tell the same of pools that are not the interpreter's to read; `takes` has one for each."""
    for take, spans, digests in zip(takes, move.spans, move.digests, strict=False):
        landed = (BlockId(s.destination + i) for s in spans for i in range(s.num_blocks))
        expected = dict(_taken(landed, digests))
        if expected and take(list(expected)) != tuple(expected.values()):
            return True
    return False


def _taken(
    blocks: Iterable[BlockId], digests: Iterable[Digest]
) -> Iterator[tuple[BlockId, Digest]]:
    """Yield blocks of which there is a digest, with it."""
    return (
        (block_id, digest)
        for block_id, digest in zip(blocks, digests, strict=False)
        if digest != NO_DIGEST
    )
