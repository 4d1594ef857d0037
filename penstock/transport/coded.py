"""Slots that hold encoded blocks: what goes into a tier is encoded, what comes out is decoded.

A `CodedTier` is a codec around the slots of any tier, which knows nothing of it. Where slots
are memory the codec works in them directly; otherwise blocks pass by a small staging buffer, some
at a time, so that what was just read is still in the cache when it is decoded.

The digest of a lossy codec's slot is over its encoded bytes, compared before anything is decoded:
it tells of bits that storage has changed. What comes out has another content than what went in, and
a digest of its own. A lossless codec's slot keeps the digest of the content, which comes back; of
bytes that cannot have been encoded there is no content. Called by `tier_mover.py`.
"""

import mmap
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import BlocksCorrupt
from penstock.core.tiers import KeptBlock
from penstock.core.types import MIB, NO_DIGEST, BlockHash, BlockId, Digest
from penstock.kv.tiers import RAW
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import SpanArray, cut
from penstock.transfer.region import Bytes2D, Region
from penstock.transport.tier import MemoryTier, Readable, TierStore

STAGING_BYTES: Final = 4 * MIB
Ints = npt.NDArray[np.int64]


class BlockCodec(Protocol):
    """What is asked of a codec; `codec/codec.py` has them. Threads may share one."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def is_lossless(self) -> bool:
        """True when blocks come back bit for bit."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the pool."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block, of a lossless codec the most that it may have."""

    def encode(self, pool: Bytes2D, block_ids: Sequence[int], encoded: Bytes2D) -> Ints:
        """Encode block `block_ids[i]` into `encoded[i]`; return the bytes of each."""

    def decode(self, encoded: Bytes2D, pool: Bytes2D, block_ids: Sequence[int]) -> None:
        """Decode `encoded[i]` into block `block_ids[i]`. Raises: `BlocksCorrupt`."""


class Copied(NamedTuple):
    """What a copy came to. `digests` are those of what is there now, in the order of the spans;
    `NO_DIGEST` for what is not there.
    """

    digests: tuple[Digest, ...]
    codec_ns: int = 0


class CodedTier:
    """A tier by way of a codec. What a lossless codec makes larger than a slot does not go in.

    `is_steady` says that no slot changes while it is read: those of other processes may.
    """

    def __init__(
        self,
        store: Readable,
        codec: BlockCodec,
        *,
        is_steady: bool = True,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        assert codec.is_lossless or codec.encoded_bytes <= store.block_bytes, store.block_bytes
        self._store = store
        self.codec = codec
        self.kind = f"{store.kind} {codec.name}"
        self.num_slots = store.num_slots
        self.block_bytes = store.block_bytes
        self._is_steady = is_steady
        self._clock = clock
        self._batch_blocks = max(1, STAGING_BYTES // codec.block_bytes)
        # Moves of several ways are carried out at once: each takes a buffer and brings it back.
        self._staging: list[Bytes2D] = []

    def contents(self) -> list[KeptBlock]:
        """Return what was there when the tier was opened."""
        return self.store.contents()

    @property
    def store(self) -> TierStore:
        """The slots, of a tier that may be written."""
        assert isinstance(self._store, TierStore), self.kind
        return self._store

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a sibling needs to read the slots."""
        return self.store.descriptor

    def close(self) -> None:
        """Let go of memory and files."""
        self.store.close()

    # ------------------------------------------------------------------------------ down

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> Copied:
        """Encode blocks into slots; `digests` are those of their content. Raises: `OSError`."""
        if isinstance(self.store, MemoryTier) and not self.codec.is_lossless:
            return self._encode_in_place(self.store, source, spans)
        sources, slots = flatten(spans)
        buffer = self._take_staging()
        stored: list[Digest] = []
        codec_ns = 0
        for start in range(0, len(sources), self._batch_blocks):
            some = slice(start, start + self._batch_blocks)
            started_ns = self._clock()
            fitting = self._encode(source, sources[some], buffer)
            codec_ns += self._clock() - started_ns
            landed = self._digests(buffer, range(len(fitting)), digests[some], fitting)
            is_in = np.flatnonzero(fitting).tolist()
            self.store.write(
                Region(buffer[: len(is_in)]),
                cut(np.arange(len(is_in)), slots[some][is_in]),
                [names[start + i] for i in is_in],
                [landed[i] for i in is_in],
            )
            stored += landed
        self._staging.append(buffer)
        return Copied(tuple(stored), codec_ns)

    def _encode_in_place(self, store: MemoryTier, source: Region, spans: SpanArray) -> Copied:
        started_ns = self._clock()
        for first, to, count in spans.tolist():
            encoded = store.region.blocks[to : to + count]
            self.codec.encode(source.blocks, range(first, first + count), encoded)
        codec_ns = self._clock() - started_ns
        store.pace(spans, started_ns)
        return Copied(self._encoded_digests(store.region.blocks, flatten(spans)[1]), codec_ns)

    def _encode(self, source: Region, ids: Ints, buffer: Bytes2D) -> npt.NDArray[np.bool_]:
        """Encode blocks into the first rows of a buffer; say which fit, and leave no gap between
        those.
        """
        codec, width = self.codec, self.block_bytes
        if codec.encoded_bytes <= width:
            codec.encode(source.blocks, ids.tolist(), buffer)
            return np.ones(len(ids), np.bool_)
        wide = np.empty((len(ids), codec.encoded_bytes), np.uint8)
        fitting = codec.encode(source.blocks, ids.tolist(), wide) <= width
        buffer[: fitting.sum()] = wide[fitting, :width]
        return fitting

    def _digests(
        self,
        buffer: Bytes2D,
        rows: range,
        digests: Sequence[Digest],
        fitting: npt.NDArray[np.bool_],
    ) -> list[Digest]:
        """Return by what blocks that were encoded into `rows` are to be known."""
        if not self.codec.is_lossless:
            return list(self._encoded_digests(buffer, rows))
        return [
            digest if is_in else NO_DIGEST for digest, is_in in zip(digests, fitting, strict=True)
        ]

    # ------------------------------------------------------------------------------ up

    def read(self, destination: Region, spans: SpanArray, digests: Sequence[Digest]) -> Copied:
        """Decode slots into blocks; of a lossy codec those whose digest is that of the slot."""
        slots, ids = flatten(spans)
        if self._is_steady and isinstance(self._store, MemoryTier) and not self.codec.is_lossless:
            started_ns = self._clock()
            copied = self._decode(self._store.region.blocks, slots, destination, ids, digests)
            self._store.pace(spans, started_ns)
            return copied
        buffer = self._take_staging()
        landed: list[Digest] = []
        codec_ns = 0
        for start in range(0, len(slots), self._batch_blocks):
            some = slice(start, start + self._batch_blocks)
            rows = np.arange(len(slots[some]))
            self._store.read(Region(buffer[: len(rows)]), cut(slots[some], rows))
            copied = self._decode(buffer, rows, destination, ids[some], digests[some])
            landed += copied.digests
            codec_ns += copied.codec_ns
        self._staging.append(buffer)
        return Copied(tuple(landed), codec_ns)

    def _decode(
        self,
        encoded: Bytes2D,
        rows: Ints,
        destination: Region,
        ids: Ints,
        digests: Sequence[Digest],
    ) -> Copied:
        """Decode rows of `encoded` that are right into blocks; return the blocks' digests."""
        good = np.ones(len(rows), np.bool_)
        if not self.codec.is_lossless:
            found = self._encoded_digests(encoded, rows)
            good[:] = [a == b for a, b in zip(found, digests, strict=True)]
        started_ns = self._clock()
        for row, block_id, count in cut(rows[good], ids[good]).tolist():
            self._decode_span(encoded[row : row + count], destination, block_id, good, ids)
        codec_ns = self._clock() - started_ns
        landed = [NO_DIGEST] * len(rows)
        for at in np.flatnonzero(good):
            (landed[at],) = take_digests(destination.blocks, [BlockId(int(ids[at]))])
        return Copied(tuple(landed), codec_ns)

    def _decode_span(
        self,
        encoded: Bytes2D,
        destination: Region,
        first: int,
        good: npt.NDArray[np.bool_],
        ids: Ints,
    ) -> None:
        """Decode adjacent rows into adjacent blocks; those that are none are not `good`."""
        block_ids = range(first, first + len(encoded))
        try:
            self.codec.decode(encoded, destination.blocks, block_ids)
        except BlocksCorrupt:
            for row, block_id in enumerate(block_ids):
                try:
                    self.codec.decode(encoded[row : row + 1], destination.blocks, [block_id])
                except BlocksCorrupt:
                    good[ids == block_id] = False

    def _encoded_digests(self, encoded: Bytes2D, rows: Sequence[int] | Ints) -> tuple[Digest, ...]:
        whole = encoded[:, : self.codec.encoded_bytes]
        return take_digests(whole, (BlockId(int(row)) for row in rows))

    def _take_staging(self) -> Bytes2D:
        """Return [batch, block_bytes] that begins at a page, for files that bypass the cache."""
        if self._staging:
            return self._staging.pop()
        memory = mmap.mmap(-1, self._batch_blocks * self.block_bytes)
        return np.frombuffer(memory, np.uint8).reshape(self._batch_blocks, self.block_bytes)


def transcode(
    source: CodedTier,
    destination: "CodedTier | TierStore",
    spans: SpanArray,
    names: Sequence[BlockHash],
    digests: Sequence[Digest],
) -> Copied:
    """Move blocks from a tier of one codec to a tier of another, or of none. Raises: `OSError`."""
    block_bytes = source.codec.block_bytes
    num_rows = max(1, STAGING_BYTES // block_bytes)
    buffer = Region(np.empty((num_rows, block_bytes), np.uint8))
    slots, targets = flatten(spans)
    stored: list[Digest] = []
    codec_ns = 0
    for start in range(0, len(slots), num_rows):
        some = slice(start, start + num_rows)
        up = source.read(buffer, cut(slots[some], np.arange(len(slots[some]))), digests[some])
        is_right = [
            found != NO_DIGEST and (found == digest or not source.codec.is_lossless)
            for found, digest in zip(up.digests, digests[some], strict=True)
        ]
        rows = np.flatnonzero(is_right)
        kept = rows.tolist()
        onward = cut(rows, targets[some][rows])
        some_names = [names[start + i] for i in kept]
        content = [up.digests[i] for i in kept]
        if isinstance(destination, CodedTier):
            down = destination.write(buffer, onward, some_names, content)
        else:
            destination.write(buffer, onward, some_names, content)
            down = Copied(tuple(content))
        landed = [NO_DIGEST] * len(is_right)
        for at, digest in zip(kept, down.digests, strict=True):
            landed[at] = digest
        stored += landed
        codec_ns += up.codec_ns + down.codec_ns
    return Copied(tuple(stored), codec_ns)


def slot_fingerprint(fingerprint: str, codec: str) -> str:
    """Return what slots of blocks of a layout are known by when they are in a codec."""
    return fingerprint if codec == RAW else f"{fingerprint} {codec}"


def flatten(spans: SpanArray) -> tuple[Ints, Ints]:
    """Return source and destination of every block, in the order of the spans."""
    counts = spans[:, 2]
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(spans[:, 0], counts) + within, np.repeat(spans[:, 1], counts) + within
