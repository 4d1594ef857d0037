"""`Prober`: tries every way to a peer's memory and measures it beside what the machine can do.

Opens ways of its own, so what requests use is left alone, and reads the peer's pool without writing
anything anywhere but into memory of its own. What the blocks hold does not matter, and may change
meanwhile. Blocks the caller; a worker runs it on a thread of its own (`runtime/links.py`).
"""

import ctypes
import fcntl
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import numpy as np
from msgspec.structs import replace

from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import PenstockError
from penstock.core.links import WayTried
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.cuda_ipc import CUDA_IPC
from penstock.transport.nixl_agent import NIXL
from penstock.transport.shm import SharedMemory
from penstock.transport.tcp import TCP
from penstock.transport.way import Source, Way

REPETITIONS: Final = 5
MEMCPY: Final = "a copy in one process"
LOOPBACK: Final = "a plain socket"
LINK_TIMEOUT_S: Final = 10.0
_NEEDS: Final = {
    TCP: ": the server needs --listen, or --transport tcp",
    NIXL: ": it is for hosts with RDMA, or --transport nixl",
}
_NETWORK: Final = Path("/sys/class/net")

Make = Callable[[], Way]
"""Makes a way of its own. Raises: a `PenstockError` saying why it cannot."""


class Prober:
    """`ways` makes each transport there is, by kind; `used` are those of requests, in order."""

    def __init__(self, ways: Mapping[str, Make], used: Iterable[str]) -> None:
        self._ways = dict(ways)
        self._used = tuple(used)

    def probe(self, info: WorkerInfo, moved_bytes: int) -> tuple[WayTried, ...]:
        """Try all of them with `moved_bytes` of a peer's first pool, or all it has."""
        memory = PeerMemory(info.worker_id, info.epoch, info.regions, info.endpoints, info.layout)
        served = {endpoint.kind: endpoint.address for endpoint in info.endpoints}
        tried = [
            self._try(kind, make, memory, served, moved_bytes) for kind, make in self._ways.items()
        ]
        if CUDA_IPC not in self._ways:
            tried.append(WayTried(kind=CUDA_IPC, refusal="KV of workers lies in host memory"))
        led = {way.kind for way in tried if not way.refusal}
        used = next((kind for kind in self._used if kind in led), None)
        return tuple(replace(way, is_used=way.kind == used) for way in tried)

    def _try(
        self,
        kind: str,
        make: Make,
        memory: PeerMemory,
        served: Mapping[str, str],
        moved_bytes: int,
    ) -> WayTried:
        # Asked first: a way that is not served need not be made, with a key or a library.
        if kind != SharedMemory.kind and kind not in served:
            missing = _NEEDS.get(kind, "")
            return WayTried(kind=kind, refusal=f"{memory.name} serves no reads that way{missing}")
        try:
            started = time.perf_counter_ns()
            with closing(make()) as way:
                source = way.open(memory, 0)
                opening_ns = time.perf_counter_ns() - started
                num_bytes, rate = _measure(source, moved_bytes)
                limit, limit_rate = _limit(kind, served.get(TCP, ""), num_bytes)
        except PenstockError as refusal:
            return WayTried(kind=kind, refusal=str(refusal))
        return WayTried(
            kind=kind,
            name=source.name,
            opening_ns=opening_ns,
            num_bytes=num_bytes,
            bytes_per_s=rate,
            limit=limit,
            limit_bytes_per_s=limit_rate,
        )


def _measure(source: Source, moved_bytes: int) -> tuple[int, float]:
    """Pull the first blocks again and again; return how much it was, and the best rate.

    The first pull is not counted: it touches pages. Raises: as the source's `pull`.
    """
    count = min(source.num_blocks, max(1, moved_bytes // source.block_bytes))
    into = Region(np.zeros((count, source.block_bytes), np.uint8))
    spans = cut(np.arange(count), np.arange(count))
    seconds = min(_timed(lambda: source.pull(into, spans)))
    return into.capacity_bytes, into.capacity_bytes / seconds


def _limit(kind: str, address: str, num_bytes: int) -> tuple[str, float]:
    """Return what a transport is compared with: a copy, a plain socket, the link's own rate."""
    if kind != TCP:
        return MEMCPY, _memcpy(num_bytes)
    with suppress(OSError, ValueError):
        host = address.rpartition(":")[0].strip("[]")
        ours = _address_towards(host)
        if ours == host or ours.startswith("127."):
            return LOOPBACK, _loopback(num_bytes)
        device, rate = link_rate(ours)
        return f"the link {device}", rate
    return "", 0.0


def _memcpy(num_bytes: int) -> float:
    source, destination = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    to, start = destination.ctypes.data, source.ctypes.data
    return num_bytes / min(_timed(lambda: ctypes.memmove(to, start, num_bytes)))


def _loopback(num_bytes: int) -> float:
    """Return the rate of a socket to ourselves and nothing else. Raises: `OSError`."""
    into = memoryview(bytearray(num_bytes))
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), LINK_TIMEOUT_S) as reader,
    ):
        owner, _ = listener.accept()
        owner.settimeout(LINK_TIMEOUT_S)
        sender = threading.Thread(target=_send, args=(owner, bytes(num_bytes)), daemon=True)
        sender.start()
        seconds = min(_timed(lambda: _ask(reader, into)))
    sender.join()
    return num_bytes / seconds


def _send(stream: socket.socket, data: bytes) -> None:
    with stream, suppress(OSError):
        while stream.recv(1):
            stream.sendall(data)


def _ask(stream: socket.socket, into: memoryview) -> None:
    stream.sendall(b"s")
    while into:
        size = stream.recv_into(into)
        if not size:
            raise OSError("the connection ended")
        into = into[size:]


def _timed(act: Callable[[], object]) -> list[float]:
    return list(_seconds(act))[1:]


def _seconds(act: Callable[[], object]) -> Iterator[float]:
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        act()
        yield time.perf_counter() - started


def _address_towards(host: str) -> str:
    """Return the address of ours that packets to `host` leave from. Raises: `OSError`."""
    family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def link_rate(address: str, network: Path = _NETWORK) -> tuple[str, float]:
    """Return the device with this address of ours, and the bytes per second that it says it does.

    Raises: `OSError` and `ValueError` when it says nothing of use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, device in socket.if_nameindex():
            request = struct.pack("16s16xQ", device.encode(), 0)
            with suppress(OSError):  # this one has no address
                answer = fcntl.ioctl(any_socket, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    megabits = int((network / device / "speed").read_text(encoding="ascii"))
                    if megabits <= 0:
                        break
                    return device, megabits * 1e6 / 8
    raise ValueError(f"nobody knows how fast {address} is")
