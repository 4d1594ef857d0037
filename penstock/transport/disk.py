"""The tier on disk: one file of slots whose size never changes, with an index that survives.

    header   4096 bytes: what this file is for; another layout, or another size, starts it afresh
    index    64 bytes a slot: name, digest, and a checksum over both and the slot's number
    slots    block_bytes each, from a page boundary on

A slot's record is cleared before its bytes are written and set after them, so a process that is
killed in between leaves a slot that is empty. A machine that loses power may leave a record without
its bytes: the digest, compared by whoever brings the block back, shows it. So does a block of a
file that was cut short, which reads as zeros. The whole file is allocated when it is made: a disk
that is full says so at the start, and the limit is the file's size.

Blocks of whole pages bypass the page cache where the file system lets them, so that what is kept
here does not drive out what is in memory. Opened by the composition root, used by `tier_mover.py`.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from penstock.core.errors import StartupFailed
from penstock.core.tiers import KeptBlock
from penstock.core.types import MIB, BlockHash, Digest
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Bytes2D, Region

PAGE_BYTES: Final = 4096
RECORD: Final = np.dtype(
    [("name", "V16"), ("digest", "<u8"), ("check", "<u8"), ("spare", "V32")], align=False
)
FORMAT: Final = "penstock kv 1"

log = logging.getLogger(__name__)


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is for. `fingerprint` is that of the layout of its blocks."""

    format: str
    fingerprint: str
    block_bytes: int
    num_slots: int


class DiskTier:
    """Slots in a file that this process alone writes while it lives.

    `is_direct` says whether blocks bypass the page cache.
    Raises: `StartupFailed` when the file cannot be had in its full size, or another process has it.
    """

    def __init__(self, path: Path, num_slots: int, block_bytes: int, fingerprint: str) -> None:
        self.kind = "disk"
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._first = PAGE_BYTES + _pages(num_slots * RECORD.itemsize)
        self._fd = self._direct_fd = -1
        header = _Header(
            format=FORMAT, fingerprint=fingerprint, block_bytes=block_bytes, num_slots=num_slots
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._prepare(header)
        except BlockingIOError:
            self.close()
            raise StartupFailed(f"{path} is in use by another process: name another one") from None
        except OSError as error:
            self.close()
            size = self._end / MIB
            raise StartupFailed(
                f"{path} cannot be {size:.0f} MiB: {error}; ask for less, or name another disk"
            ) from error
        if block_bytes % PAGE_BYTES == 0:
            with suppress(OSError):  # tmpfs and others have no direct way
                self._direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._kept = list(self._load())

    @property
    def is_direct(self) -> bool:
        """Tell whether blocks bypass the page cache."""
        return self._direct_fd >= 0

    def contents(self) -> list[KeptBlock]:
        """Return what was there when the file was opened."""
        return self._kept

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        """Copy blocks into slots. Raises: `OSError`; then none of the slots holds anything."""
        rows = spans.tolist()
        slots = [slot for _, to, count in rows for slot in range(to, to + count)]
        records = np.zeros(len(slots), RECORD)
        at = 0
        for _, to, count in rows:
            self._write_records(to, records[at : at + count])
            at += count
        for first, to, count in rows:
            self._write_all(source.blocks[first : first + count], self._offset(to))
        records["name"] = [np.void(name) for name in names]
        records["digest"] = digests
        records["check"] = list(map(_check, slots, names, digests))
        at = 0
        for _, to, count in rows:
            self._write_records(to, records[at : at + count])
            at += count

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks. What cannot be read comes out as zeros: a digest shows it."""
        for slot, to, count in spans.tolist():
            blocks = destination.blocks[to : to + count]
            try:
                num_read = self._read_all(blocks, self._offset(slot))
            except OSError as error:
                log.warning("slots %d to %d cannot be read: %s", slot, slot + count, error)
                num_read = 0
            if num_read < blocks.nbytes:
                blocks.reshape(-1)[num_read:] = 0

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    # ------------------------------------------------------------------------------ the file

    @property
    def _end(self) -> int:
        return self._offset(self.num_slots)

    def _offset(self, slot: int) -> int:
        return self._first + slot * self.block_bytes

    def _prepare(self, header: _Header) -> None:
        """Make the file what it has to be; keep its content if it is that already."""
        wanted = msgspec.json.encode(header).ljust(PAGE_BYTES, b"\0")
        found = os.pread(self._fd, PAGE_BYTES, 0)
        if found != wanted:
            if found:
                log.warning("the KV on disk is of another model, shape or size: starting afresh")
            os.ftruncate(self._fd, 0)
        elif os.fstat(self._fd).st_size != self._end:
            log.warning("the KV on disk was cut short: what is missing is computed again")
        self._allocate()
        os.pwrite(self._fd, wanted, 0)

    def _allocate(self) -> None:
        """Take the room of the whole file. Raises: `OSError`; then it is given back.

        What is clearly too much is not even tried: the disk would be full for others meanwhile.
        """
        before = os.fstat(self._fd)
        disk = os.fstatvfs(self._fd)
        if self._end - before.st_blocks * 512 > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, f"{disk.f_bavail * disk.f_frsize / MIB:.0f} MiB are free")
        try:
            os.posix_fallocate(self._fd, 0, self._end)
        except OSError:
            os.ftruncate(self._fd, before.st_size)
            raise

    def _load(self) -> Iterator[KeptBlock]:
        """Yield the slots whose records are whole; of two with one name the first."""
        raw = os.pread(self._fd, self.num_slots * RECORD.itemsize, PAGE_BYTES)
        records = np.frombuffer(raw, RECORD)
        seen = set()
        for slot in np.flatnonzero(records["digest"]).tolist():
            record = records[slot]
            name, digest = BlockHash(record["name"].tobytes()), Digest(int(record["digest"]))
            if int(record["check"]) == _check(slot, name, digest) and name not in seen:
                seen.add(name)
                yield KeptBlock(slot, name, digest)

    def _write_records(self, first: int, records: npt.NDArray[np.void]) -> None:
        offset = PAGE_BYTES + first * RECORD.itemsize
        num_written = os.pwrite(self._fd, records.tobytes(), offset)
        if num_written != records.nbytes:
            raise OSError(f"{num_written} of {records.nbytes} bytes of the index were written")

    def _write_all(self, blocks: Bytes2D, offset: int) -> None:
        view = blocks.reshape(-1).data
        fd = self._fd_for(blocks)
        while view:
            num_written = os.pwrite(fd, view, offset)
            if num_written == 0:
                raise OSError("nothing more could be written")
            view, offset = view[num_written:], offset + num_written

    def _read_all(self, blocks: Bytes2D, offset: int) -> int:
        """Read into blocks; return how many bytes there were."""
        view = blocks.reshape(-1).data
        fd, done = self._fd_for(blocks), 0
        while done < len(view):
            num_read = os.preadv(fd, [view[done:]], offset + done)
            if num_read == 0:
                break
            done += num_read
        return done

    def _fd_for(self, blocks: Bytes2D) -> int:
        """Return the direct way for memory that begins at a page, else the one by the cache."""
        is_aligned = blocks.__array_interface__["data"][0] % PAGE_BYTES == 0
        return self._direct_fd if self.is_direct and is_aligned else self._fd


def _check(slot: int, name: BlockHash, digest: Digest) -> int:
    return xxh3_64_intdigest(name + digest.to_bytes(8, "little") + slot.to_bytes(8, "little"))


def _pages(num_bytes: int) -> int:
    """Return whole pages in bytes."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
