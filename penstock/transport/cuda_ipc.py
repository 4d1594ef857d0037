"""The way between GPUs of one host: a peer's pool is mapped, and blocks are copied on the device.

The owner's allocation is named by a CUDA IPC handle; the reader maps it for its own device, the
same one or one that reaches it, and copies one span after the other on a stream of its own. The
owner takes no part. What it offers is complete, since it offers what a step has computed, and a
pull returns when the copies have ended: no event crosses between processes.

**Not run on a GPU yet.** What a machine without one can show, the tests show, with a library that
has the driver's functions and copies between memory that two processes share. The tests marked
`gpu` in `tests/transport/test_cuda_ipc.py` are to be run where there is one.

A mapping says nothing of its owner, so each pull asks before and after whether that very process is
alive: its id with the time of its start. `mover.py` takes this way for pools that are
`CudaRegion`s. `Agent`, whose memory is the host's, does not.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import PeerMemory, Region, described_blocks
from penstock.transport.cuda_driver import HANDLE_BYTES, UUID_BYTES, Copy, Driver

if TYPE_CHECKING:
    from torch import Tensor

CUDA_IPC: Final = "cuda_ipc"
SILENCE_S: Final = 5.0
BYTES_PER_S_MIN: Final = 1 << 30
SPIN_S: Final = 200e-6
NAP_S: Final = 50e-6


@dataclass(frozen=True, slots=True)
class CudaRegion:
    """One group's pool in a device's memory: blocks one behind the other from `address` on."""

    device: int
    address: int
    num_blocks: int
    block_bytes: int

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes


class CudaLocation(msgspec.Struct, frozen=True, array_like=True):
    """Where a pool is: device, allocation and place in it in hex and bytes, and whose it is."""

    uuid: str
    handle: str
    offset: int
    pid: int
    started: int


def cuda_region(tensor: "Tensor") -> CudaRegion:
    """Return a tensor's memory as a region: [num_blocks, ...], `tensor[i]` is block i.

    It must not be freed while peers may read it.
    """
    assert tensor.is_cuda, tensor.device
    assert tensor.is_contiguous(), tensor.stride()
    device = tensor.device.index or 0
    return CudaRegion(device, tensor.data_ptr(), len(tensor), tensor[0].nbytes)


def describe(driver: Driver, region: CudaRegion, pid: int) -> RegionDescriptor:
    """Return what a peer needs to map a region of this process, whose id is `pid`.

    Raises: `BackendUnavailable` when the memory cannot be shared.
    """
    exported = driver.export(region.device, region.address)
    started = _started(pid)
    assert started is not None, pid
    uuid = driver.uuid(region.device).hex()
    location = CudaLocation(uuid, exported.handle.hex(), exported.offset, pid, started)
    text = msgspec.json.encode(location).decode()
    return RegionDescriptor(CUDA_IPC, text, region.capacity_bytes, region.block_bytes)


class CudaIpc:
    """The way to pools on GPUs of this host, into those of `device`. One pull at a time."""

    kind: Final = CUDA_IPC

    def __init__(self, driver: Driver, device: int, *, silence_s: float = SILENCE_S) -> None:
        self._driver = driver
        self._device = device
        self._silence_s = silence_s
        self._mapped: list[MappedCudaPool] = []
        self._is_stuck = False
        self._lock = threading.Lock()

    def open(self, peer: PeerMemory, index: int) -> "MappedCudaPool":
        """Map a peer's pool.

        Raises: `PeerLost` when it is not on a GPU, not on this host, not there any more, or out of
        reach of our device.
        """
        descriptor = peer.regions[index]
        location = _parse(descriptor)
        _check_alive(location)
        other = self._driver.find(bytes.fromhex(location.uuid))
        if other is not None and not self._driver.can_reach(self._device, other):
            raise PeerLost(f"GPU {self._device} does not reach GPU {other}")
        with self._lock:
            mapped = self._driver.map(self._device, bytes.fromhex(location.handle))
            source = MappedCudaPool(self, peer, index, location, mapped.address)
            self._mapped.append(source)
            if location.offset + descriptor.capacity_bytes > mapped.num_bytes:
                source.is_forgotten = True
                self._sweep()
                raise PeerLost(f"the pool is not inside its allocation of {mapped.num_bytes} bytes")
        return source

    def own(self, region: CudaRegion) -> "OwnCudaPool":
        """Return a pool of this process on our device, to copy blocks within it."""
        return OwnCudaPool(self, region)

    def copy(self, address: int, destination: CudaRegion, spans: SpanArray) -> None:
        """Copy spans of our own blocks. Raises: `PeerLost`, `DeadlineExceeded`."""
        with self._lock:
            self._check_stuck()
            self._carry_out(address, destination, spans, "itself")

    def pull(self, source: "MappedCudaPool", destination: CudaRegion, spans: SpanArray) -> None:
        """Copy spans and wait until they have landed. Raises: `PeerLost`, `DeadlineExceeded`."""
        with self._lock:
            if source.is_forgotten:
                raise PeerLost(f"{source.owner} was forgotten")
            self._check_stuck()
            _check_alive(source.location)
            self._carry_out(source.address, destination, spans, source.owner)
            # Whose process has ended meanwhile, his memory may be somebody else's by now.
            _check_alive(source.location)
            self._sweep()

    def forget(self, name: str, epoch: int) -> None:
        """Unmap what is open to this incarnation, as soon as no pull reads it."""
        self._forget([m for m in tuple(self._mapped) if (m.owner, m.epoch) == (name, epoch)])

    def close(self) -> None:
        """Unmap everything."""
        self._forget(list(self._mapped))

    def _forget(self, sources: "list[MappedCudaPool]") -> None:
        for source in sources:
            source.is_forgotten = True
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _carry_out(
        self, address: int, destination: CudaRegion, spans: SpanArray, owner: str
    ) -> None:
        assert destination.device == self._device, (destination.device, self._device)
        size = destination.block_bytes
        copies = [
            Copy(destination.address + to * size, address + start * size, count * size)
            for start, to, count in spans.tolist()
        ]
        limit_s = self._silence_s + sum(copy.num_bytes for copy in copies) / BYTES_PER_S_MIN
        try:
            self._driver.copy(self._device, copies)
        finally:
            self._wait(owner, limit_s)

    def _sweep(self) -> None:
        if self._is_stuck:
            return  # copies that nobody can call back still read it
        gone = [source for source in self._mapped if source.is_forgotten]
        for source in gone:
            self._mapped.remove(source)
            self._driver.unmap(self._device, source.base)

    def _check_stuck(self) -> None:
        """Begin nothing behind copies that were given up. Raises: `DeadlineExceeded`."""
        if self._is_stuck and not self._driver.is_done(self._device):
            raise DeadlineExceeded(f"GPU {self._device} has not ended an earlier copy")
        self._is_stuck = False

    def _wait(self, owner: str, limit_s: float) -> None:
        started = time.monotonic()
        while not self._driver.is_done(self._device):
            waited_s = time.monotonic() - started
            if waited_s > limit_s:
                self._is_stuck = True
                raise DeadlineExceeded(
                    f"GPU {self._device} has copied from {owner} for {limit_s:.1f} s without an end"
                )
            if waited_s > SPIN_S:
                time.sleep(NAP_S)


class MappedCudaPool:
    """A peer's pool, as our device sees it."""

    name: Final = CUDA_IPC

    def __init__(
        self, way: CudaIpc, peer: PeerMemory, index: int, location: CudaLocation, base: int
    ) -> None:
        self._way = way
        self.owner = peer.name
        self.epoch = peer.epoch
        self.location = location
        self.base = base
        self.address = base + location.offset
        self.num_blocks = described_blocks(peer.regions[index])
        self.block_bytes = peer.regions[index].block_bytes
        self.is_forgotten = False

    def pull(self, destination: Region | CudaRegion, spans: SpanArray) -> None:
        """Copy spans that lie inside both regions; the destination is on our device.

        Raises: `PeerLost` when the owner is gone or the destination is not on a GPU,
        `DeadlineExceeded` when the device does not come to an end; then its copies may still land.
        """
        if not isinstance(destination, CudaRegion):
            raise PeerLost("memory of a GPU is pulled into memory of a GPU")
        self._way.pull(self, destination, spans)


class OwnCudaPool:
    """A pool of this process, as one to copy from."""

    name: Final = CUDA_IPC

    def __init__(self, way: CudaIpc, region: CudaRegion) -> None:
        self._way = way
        self._region = region
        self.num_blocks = region.num_blocks
        self.block_bytes = region.block_bytes

    def pull(self, destination: Region | CudaRegion, spans: SpanArray) -> None:
        """Copy spans within our device. Raises: as `MappedCudaPool.pull`."""
        if not isinstance(destination, CudaRegion):
            raise PeerLost("memory of a GPU is copied into memory of a GPU")
        self._way.copy(self._region.address, destination, spans)


def _parse(descriptor: RegionDescriptor) -> CudaLocation:
    """Return where a descriptor says that a pool is. Raises: `PeerLost` when it makes no sense."""
    if descriptor.kind != CUDA_IPC:
        raise PeerLost(f"{descriptor.kind or 'private'} memory is not on a GPU")
    try:
        location = msgspec.json.decode(descriptor.location, type=CudaLocation)
        sizes = len(bytes.fromhex(location.uuid)), len(bytes.fromhex(location.handle))
    except (msgspec.DecodeError, ValueError) as error:
        raise PeerLost(f"its CUDA IPC location makes no sense: {error}") from error
    is_whole = described_blocks(descriptor) * descriptor.block_bytes == descriptor.capacity_bytes
    if sizes != (UUID_BYTES, HANDLE_BYTES) or location.offset < 0 or not is_whole:
        raise PeerLost(f"{descriptor} does not describe a pool")
    return location


def _check_alive(location: CudaLocation) -> None:
    """Ask for the process that owns a pool. Raises: `PeerLost` when it has ended."""
    if _started(location.pid) != location.started:
        raise PeerLost(f"the process {location.pid} that owns the pool is gone, or on another host")


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since the host did, or None if it has ended."""
    try:
        # Behind the name, which may hold anything: state, parent, ..., and the start as number 20.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
