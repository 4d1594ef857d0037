"""KV pools in shared memory: a peer on the same host maps them and copies straight out.

On Linux a pool is a memfd. It has no name in any file system: a peer of the same user reaches it
through `/proc/<pid>/fd/<n>`, and the kernel takes it back when the last process that maps it is
gone, however that process ended. Its label carries a random token, which the peer checks on what it
has opened, so neither a pid nor a descriptor number that has come into use again can be mistaken
for the pool. Its size is sealed: no mapping can lose its pages.

Where there is no memfd (macOS), a pool is a file in the folder for temporary files. It works the
same, but dirty pages may go to the disk, and a killed owner leaves the file behind. Not
`multiprocessing.shared_memory`: its segments cannot be closed while an array looks at them, and
before Python 3.13 whoever maps one also removes it when it ends.

Knows bytes and blocks, no request and no layout. The runtime makes a worker's pools, `SharedMemory`
is the way to those of peers.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import secrets
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import PeerLost, StartupFailed
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import PeerMemory, Region, described_blocks
from penstock.transport.native.library import address_of_own, load_library

MEMFD: Final = "memfd"
FILE: Final = "file"
HOST_KIND: Final = MEMFD if sys.platform == "linux" else FILE
SMALL_BYTES: Final = 64 << 10
POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE, which the mmap module does not name."""

log = logging.getLogger(__name__)


class SharedPool:
    """Memory of one KV group: `region.blocks` is [num_blocks, block_bytes] uint8, zero at first.

    Pages are taken when they are first touched. `close` lets no further peer in; the memory goes
    with the last array that looks at it, in this process and in its peers.
    Raises: `StartupFailed` when the system does not give the memory.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, kind: str = HOST_KIND) -> None:
        capacity_bytes = num_blocks * block_bytes
        self._kind = kind
        self._token = secrets.token_hex(16)
        self._fd = -1
        try:
            self._fd = _CREATE[kind](self._token)
            os.ftruncate(self._fd, capacity_bytes)
            memory = mmap.mmap(self._fd, capacity_bytes, mmap.MAP_SHARED)
        except OSError as error:
            self.close()
            raise StartupFailed(f"no shared memory of {capacity_bytes} bytes: {error}") from error
        if kind == MEMFD:
            _seal(self._fd)
            _ask_for_huge_pages(memory)
        self.region = Region(np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes))

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a peer needs to map the pool."""
        assert self._fd >= 0, "the pool is closed"
        location = str(_path(self._token))
        if self._kind == MEMFD:
            location = f"{os.getpid()}:{self._fd}:{self._token}"
        region = self.region
        return RegionDescriptor(self._kind, location, region.capacity_bytes, region.block_bytes)

    def populate(self, first: int, num_blocks: int) -> None:
        """Take the pages of some blocks now; blocks. Low numbers are handed out first.

        A first touch costs ten times what a copy does, and would be part of some request's latency.
        Contents stay as they are, so others may use the pool meanwhile. A hint: a kernel that does
        not know it (Linux before 5.14) takes pages when they are touched.
        """
        taken = self.region.blocks[first : first + num_blocks]
        if sys.platform == "linux":
            # Not `mmap.madvise`, which would hold the interpreter lock for seconds.
            libc = ctypes.CDLL(None)
            ahead = taken.ctypes.data % mmap.PAGESIZE
            address = ctypes.c_void_p(taken.ctypes.data - ahead)
            if libc.madvise(address, ctypes.c_size_t(taken.nbytes + ahead), POPULATE_WRITE) != 0:
                log.info("this kernel takes the pool's pages when they are touched")

    def close(self) -> None:
        """Give up the name or descriptor by which peers come in; closing twice is fine."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._kind == FILE:
            _path(self._token).unlink(missing_ok=True)


def open_peer(descriptor: RegionDescriptor, *, is_writable: bool = False) -> Region:
    """Map a peer's pool, read-only unless told otherwise, for as long as an array looks at it.

    Raises: `PeerLost` when that very pool is not there any more or is not what the descriptor says.
    """
    try:
        fd = _OPEN[descriptor.kind](descriptor.location, os.O_RDWR if is_writable else os.O_RDONLY)
    except KeyError:
        raise PeerLost(f"{descriptor.kind or 'private'} memory cannot be mapped") from None
    except (OSError, ValueError) as error:
        raise PeerLost(f"pool {descriptor.location} cannot be opened: {error}") from error
    try:
        size = os.fstat(fd).st_size
        described = described_blocks(descriptor) * descriptor.block_bytes
        if not size == described == descriptor.capacity_bytes:
            raise PeerLost(f"{descriptor} does not describe a pool of {size} bytes")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED, access)
    finally:
        os.close(fd)
    return Region(np.frombuffer(memory, np.uint8).reshape(-1, descriptor.block_bytes))


class SharedMemory:
    """The way to pools on the same host: what opens is there, so nobody asks which host it is."""

    kind: Final = "shm"

    def open(self, peer: PeerMemory, index: int) -> "MappedPool":
        """Map a peer's pool.

        Raises: `PeerLost` when it cannot be mapped here, or is not there any more.
        """
        return MappedPool(open_peer(peer.regions[index]), peer.regions[index])

    def forget(self, name: str, epoch: int) -> None:
        """Leave it to the last reference: a mapping goes when nobody looks at it."""

    def close(self) -> None:
        """Leave it to the last reference."""


class MappedPool:
    """A peer's pool in our address space; it outlives its owner."""

    def __init__(self, region: Region, descriptor: RegionDescriptor | None = None) -> None:
        self.region = region
        self._descriptor = descriptor
        self._writable: Region | None = None
        self.num_blocks = region.num_blocks
        self.block_bytes = region.block_bytes
        self.name = "shm" if load_library() is not None else "shm (numpy)"

    def pull(self, destination: Region, spans: SpanArray) -> None:
        """Copy spans that lie inside both regions."""
        copy_spans(self.region, destination, spans)

    def push(self, source: Region, spans: SpanArray) -> None:
        """Write spans of ours that lie inside both regions; nothing is mapped writable before.

        Raises: `PeerLost` when the pool cannot be mapped so.
        """
        if self._writable is None:
            assert self._descriptor is not None, "this is our own pool"
            self._writable = open_peer(self._descriptor, is_writable=True)
        copy_spans(source, self._writable, spans)


def copy_spans(source: Region, destination: Region, spans: SpanArray) -> None:
    """Copy spans that lie inside both regions, in one native call where there is a compiler.

    Without the interpreter lock: the worker's other threads go on. A single small span is copied by
    numpy, which takes a third of the time of calling anything.
    """
    library = load_library()
    if not len(spans):
        return
    is_small = len(spans) == 1 and int(spans[0, 2]) * source.block_bytes <= SMALL_BYTES
    if library is not None and not is_small:
        assert spans.flags.c_contiguous, spans.strides
        addresses = source.address, destination.address
        library.penstock_copy(*addresses, source.block_bytes, address_of_own(spans), len(spans))
        return
    for start, to, count in spans.tolist():
        destination.blocks[to : to + count] = source.blocks[start : start + count]


# --- memfd


def _create_memfd(token: str) -> int:
    return os.memfd_create(_label(token), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _seal(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    # A hint: a kernel that has no huge pages for shared memory refuses, and small pages do.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _open_memfd(location: str, mode: int) -> int:
    pid, number, token = location.split(":")
    # Whatever is there now must not make us wait, as a pipe would.
    fd = os.open(f"/proc/{int(pid)}/fd/{int(number)}", mode | os.O_NONBLOCK)
    # What was opened is asked, not the path, which may lead elsewhere a moment later.
    label = os.readlink(f"/proc/self/fd/{fd}")
    if label != f"/memfd:{_label(token)} (deleted)":
        os.close(fd)
        raise ValueError(f"{label} is in its place")
    return fd


def _label(token: str) -> str:
    return f"penstock-kv-{token}"


# --- file


def _create_file(token: str) -> int:
    path = _path(token)
    log.warning("no memfd here: the KV pool is the file %s and may be written to disk", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)


def _open_file(location: str, mode: int) -> int:
    path = Path(location)
    if path.parent != _path("").parent or not path.name.startswith(_label("")):
        raise ValueError("not a pool's file")
    return os.open(path, mode | os.O_NOFOLLOW)


def _path(token: str) -> Path:
    return Path(tempfile.gettempdir(), _label(token))


_CREATE: Final = {MEMFD: _create_memfd, FILE: _create_file}
_OPEN: Final = {MEMFD: _open_memfd, FILE: _open_file}
