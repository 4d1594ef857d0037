"""The tier on disk: one file of slots whose size never changes, with an index that survives.

    header   4096 bytes: what this file is for; another layout, or another size, starts it afresh
    index    64 bytes a slot: name, digest, and a checksum over both and the slot's number
    slots    block_bytes each, from a page boundary on

A slot's record is cleared before its bytes are written and set after them, so a process that is
killed in between leaves a slot that is empty. A machine that loses power may leave a record without
its bytes: the digest, compared by whoever brings the block back, shows it. So does a block of a
file that was cut short, which reads as zeros. The whole file is allocated when it is made: a disk
that is full says so at the start, and the limit is the file's size.

Siblings of the owner read the file (`DiskReader`) while it is written. Blocks of whole pages bypass
the page cache where the file system lets them, so that what is kept here does not drive out what is
in memory. Opened by the composition root, used by `tier_mover.py`.
"""

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import StartupFailed
from penstock.core.tiers import KeptBlock
from penstock.core.types import MIB, BlockHash, Digest
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Bytes2D, Region

PAGE_BYTES: Final = 4096
DISK_KIND: Final = "disk"
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
        self.path = path.absolute()
        self._first = _first_slot(num_slots)
        self._fd = self._direct_fd = -1
        header = _header(num_slots, block_bytes, fingerprint)
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
        self._direct_fd = _open_direct(path, os.O_RDWR, block_bytes)
        self._kept = list(self._load())

    @property
    def is_direct(self) -> bool:
        """Tell whether blocks bypass the page cache."""
        return self._direct_fd >= 0

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a sibling needs to read the slots; its bytes are those of the slots alone."""
        num_bytes = self.num_slots * self.block_bytes
        return RegionDescriptor(DISK_KIND, str(self.path), num_bytes, self.block_bytes)

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
        _read_slots((self._fd, self._direct_fd), destination, spans, self._first)

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

    def _prepare(self, wanted: bytes) -> None:
        """Make the file what it has to be; keep its content if it is that already."""
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
        fd = _fd_for(blocks, (self._fd, self._direct_fd))
        while view:
            num_written = os.pwrite(fd, view, offset)
            if num_written == 0:
                raise OSError("nothing more could be written")
            view, offset = view[num_written:], offset + num_written


class DiskReader:
    """The slots in a file that another process of this host writes.

    Raises: `OSError` when there is no such file, or it is for something else.
    """

    def __init__(self, path: Path, num_slots: int, block_bytes: int, fingerprint: str) -> None:
        self.kind = "disk"
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._lock = threading.Lock()
        self._num_reads = 0
        self._is_closed = False
        self._direct_fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        if os.pread(self._fd, PAGE_BYTES, 0) != _header(num_slots, block_bytes, fingerprint):
            self.close()
            raise OSError(f"{path} is of another model, shape or size")
        self._direct_fd = _open_direct(path, os.O_RDONLY, block_bytes)

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks. What cannot be read comes out as zeros: a digest shows it."""
        with self._lock:
            if self._is_closed:
                raise OSError("its owner is gone")
            self._num_reads += 1
        try:
            fds = self._fd, self._direct_fd
            _read_slots(fds, destination, spans, _first_slot(self.num_slots))
        finally:
            with self._lock:
                self._num_reads -= 1
                self._close_if_unused()

    def close(self) -> None:
        """Close the file once no read needs it any more. Does not wait."""
        with self._lock:
            self._is_closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._is_closed or self._num_reads:
            return
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


def _read_slots(
    fds: tuple[int, int], destination: Region, spans: SpanArray, first_slot: int
) -> None:
    """Copy slots into blocks, zeros where nothing can be read; `fds`: by the cache, direct."""
    for slot, to, count in spans.tolist():
        blocks = destination.blocks[to : to + count]
        offset = first_slot + slot * destination.block_bytes
        try:
            num_read = _read_all(_fd_for(blocks, fds), blocks, offset)
        except OSError as error:
            log.warning("slots %d to %d cannot be read: %s", slot, slot + count, error)
            num_read = 0
        if num_read < blocks.nbytes:
            blocks.reshape(-1)[num_read:] = 0


def _read_all(fd: int, blocks: Bytes2D, offset: int) -> int:
    """Read into blocks; return how many bytes there were."""
    view = blocks.reshape(-1).data
    done = 0
    while done < len(view):
        num_read = os.preadv(fd, [view[done:]], offset + done)
        if num_read == 0:
            break
        done += num_read
    return done


def _fd_for(blocks: Bytes2D, fds: tuple[int, int]) -> int:
    """Return the direct way for memory that begins at a page, else the one by the cache."""
    cached, direct = fds
    is_aligned = blocks.__array_interface__["data"][0] % PAGE_BYTES == 0
    return direct if direct >= 0 and is_aligned else cached


def _open_direct(path: Path, mode: int, block_bytes: int) -> int:
    """Return a descriptor that bypasses the page cache, or -1 where there is no such way."""
    if block_bytes % PAGE_BYTES == 0:
        with suppress(OSError):  # tmpfs and others have none
            return os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
    return -1


def _header(num_slots: int, block_bytes: int, fingerprint: str) -> bytes:
    """Return the first page of a file."""
    header = _Header(
        format=FORMAT, fingerprint=fingerprint, block_bytes=block_bytes, num_slots=num_slots
    )
    return msgspec.json.encode(header).ljust(PAGE_BYTES, b"\0")


def _first_slot(num_slots: int) -> int:
    """Return where the slots begin, in bytes."""
    return PAGE_BYTES + _pages(num_slots * RECORD.itemsize)


def _check(slot: int, name: BlockHash, digest: Digest) -> int:
    return xxh3_64_intdigest(name + digest.to_bytes(8, "little") + slot.to_bytes(8, "little"))


def _pages(num_bytes: int) -> int:
    """Return whole pages in bytes."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
