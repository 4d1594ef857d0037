"""Blocks that cross a wire encoded: the owner makes rows of them as they are read, we decode those.

A region that is served so has rows instead of blocks: the encoded block, padded to whole words,
then two digests, of the block as it is in the owner's pool and of the row before them. The first
is compared with the one that was offered, so bytes that had changed there are found as ever; the
second tells of what happened on the way. Only then is a row decoded into our pool, where it has a
digest of its own. `tcp_owner.py` serves such regions, `mover.py` reads them.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from penstock.core.errors import BlocksCorrupt
from penstock.core.types import MIB, NO_DIGEST, BlockId, Digest
from penstock.native.encoder import NativeEncoder
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray, cut
from penstock.transfer.region import Bytes2D, Region
from penstock.transport.coded import BlockCodec, flatten
from penstock.transport.reshape import Carried
from penstock.transport.way import Source

STAGING_BYTES: Final = 4 * MIB
_WORD: Final = 8
_DIGESTS_BYTES: Final = 2 * _WORD
ROWS: Final = "rows"
"""The kind of a described region that has rows; its location names the codec."""
BLOCK_BYTES_MIN: Final = 256
"""Smaller blocks are not worth it, and their digests would be another function natively."""


class WireCodec(BlockCodec, Protocol):
    """What is asked of a codec on a wire: rows of one size, so it is a lossy one."""

    @property
    def native_encoder(self) -> NativeEncoder | None:
        """The codec's native part; None where nothing was compiled."""


def row_bytes(codec: BlockCodec) -> int:
    """Return the bytes of a row."""
    assert not codec.is_lossless, codec.name
    return -(-codec.encoded_bytes // _WORD) * _WORD + _DIGESTS_BYTES


def encode_rows(codec: BlockCodec, region: Region, block_ids: Sequence[int]) -> Bytes2D:
    """Return blocks as rows, `[n, row_bytes]`; what the native server does by itself."""
    rows = np.zeros((len(block_ids), row_bytes(codec)), np.uint8)
    codec.encode(region.blocks, block_ids, rows)
    content, digests = _parts(rows)
    digests[:, 0] = take_digests(region.blocks, map(BlockId, block_ids))
    digests[:, 1] = take_digests(content, map(BlockId, range(len(rows))))
    return rows


class EncodedReader:
    """Pulls rows of one codec and decodes them; pulls at once have each a buffer of their own."""

    def __init__(self, codec: BlockCodec, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.codec = codec
        self.row_bytes = row_bytes(codec)
        self._num_rows = max(1, STAGING_BYTES // self.row_bytes)
        self._clock = clock
        self._idle: list[Region] = []

    def pull(
        self, source: Source, destination: Region, spans: SpanArray, offered: Sequence[Digest]
    ) -> Carried:
        """Fill blocks of ours; `spans` lie inside both regions, `offered` has a digest for each.

        Raises: `BlocksCorrupt` before anything wrong is decoded, and what `Source.pull` raises;
        the blocks then hold nothing of use.
        """
        sources, ids = flatten(spans)
        assert len(offered) == len(ids), (len(offered), len(ids))
        staged = self._idle.pop() if self._idle else self._make_buffer()
        landed: list[Digest] = []
        codec_ns = num_spans = 0
        for start in range(0, len(ids), self._num_rows):
            some = slice(start, start + self._num_rows)
            rows = np.arange(len(ids[some]))
            onto_rows = cut(sources[some], rows)
            source.pull(staged, onto_rows)
            num_spans += len(onto_rows)
            filled = staged.blocks[: len(rows)]
            _compare(filled, offered[some])
            started_ns = self._clock()
            self.codec.decode(filled, destination.blocks, ids[some].tolist())
            codec_ns += self._clock() - started_ns
            landed += take_digests(destination.blocks, map(BlockId, ids[some].tolist()))
        # Not after an error: a pull that was given up may still be writing.
        self._idle.append(staged)
        num_bytes = len(ids) * self.row_bytes
        return Carried(num_bytes, num_spans, self.codec.name, tuple(landed), codec_ns)

    def _make_buffer(self) -> Region:
        return Region(np.empty((self._num_rows, self.row_bytes), np.uint8))


def _compare(rows: Bytes2D, offered: Sequence[Digest]) -> None:
    """Raises: `BlocksCorrupt` when a row is not what was sent, or of a block that is not as it was
    offered.
    """
    content, digests = _parts(rows)
    found = take_digests(content, map(BlockId, range(len(rows))))
    for (of_block, of_row), taken, expected in zip(digests.tolist(), found, offered, strict=True):
        if (of_row or ~NO_DIGEST) != taken or (of_block or ~NO_DIGEST) != expected:
            raise BlocksCorrupt("a block that was read encoded is not the one that was offered")


def _parts(rows: Bytes2D) -> tuple[Bytes2D, npt.NDArray[np.uint64]]:
    """Return views of the rows' contents and of their two digests."""
    return rows[:, :-_DIGESTS_BYTES], rows[:, -_DIGESTS_BYTES:].view("<u8")
