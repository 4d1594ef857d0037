"""Measures what two processes move, each transport beside what this machine can do at most.

Who is compared takes turns, so that a drift of the machine hits all of them. Pools are touched
before. Called by `handoff.py`, which has the peer.
"""

import ctypes
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final

import numpy as np

from penstock.cli.checks.finding import Extent, Finding, ok, warning
from penstock.cli.checks.peer import (
    ANSWER,
    BLOCK_BYTES,
    CLOCK,
    FACTS,
    NUM_SMALL,
    SEND,
    SMALL_BYTES,
    fill,
)
from penstock.core.errors import PeerLost, PenstockError
from penstock.transfer.plan import cut
from penstock.transfer.region import Region, address_of
from penstock.transport.handshake import prove
from penstock.transport.shm import SharedPool
from penstock.transport.way import Source

LATENCIES: Final = 100
OURS: Final = ("shm", "tcp")
"""Transports whose rates we answer for."""
SHARE_MIN: Final = 0.4
"""Below this share of what is possible something is in the way; a busy machine stays above it."""
MEMCPY_BYTES_PER_S_MIN: Final = 2e9
SOCKET_TIMEOUT_S: Final = 20.0
FACTS_BYTES_MAX: Final = 1 << 20
_BUSY: Final = "is the machine busy? Look at top, and at what other containers do"

Measured = dict[str, float]
"""The best by name: bytes per second, or seconds."""


class Plain:
    """A plain socket to the peer: what the same takes without Penstock. A context manager.

    Raises: `PeerLost` and `DeadlineExceeded` when the peer does not know our key, `OSError`.
    """

    def __init__(self, host: str, port: int, key: bytes) -> None:
        self._stream = socket.create_connection((host, port), timeout=SOCKET_TIMEOUT_S)
        try:
            prove(self._stream, key, SOCKET_TIMEOUT_S)
        except PenstockError:
            self._stream.close()
            raise
        self._stream.settimeout(SOCKET_TIMEOUT_S)
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stream.close()

    def receive(self, into: Region) -> None:
        """Receive what a transfer moves, in place."""
        self._stream.sendall(SEND)
        self._fill(into.blocks.reshape(-1).data)

    def round_trip(self) -> None:
        """Send a byte and wait for the answer."""
        self._stream.sendall(ANSWER)
        self._fill(memoryview(bytearray(1)))

    def facts(self) -> dict[str, Any]:
        """Return what the peer says of itself."""
        self._stream.sendall(FACTS)
        line = b""
        while not line.endswith(b"\n") and len(line) < FACTS_BYTES_MAX:
            line += self._receive_some()
        facts: dict[str, Any] = json.loads(line)
        return facts

    def skew_ns(self, *, is_one_host: bool) -> tuple[int, int]:
        """Return the peer's clock less ours, and the round trip within which that is known.

        On one host the monotonic clock, which has no meaning on another; there the time of day.
        """
        read, index = (time.monotonic_ns, 0) if is_one_host else (time.time_ns, 1)
        best = (0, 1 << 62)
        answer = bytearray(16)
        for _ in range(20):
            before = read()
            self._stream.sendall(CLOCK)
            self._fill(memoryview(answer))
            after = read()
            theirs: int = struct.unpack("<2q", answer)[index]
            if after - before < best[1]:
                best = (theirs - (before + after) // 2, after - before)
        return best

    def _receive_some(self) -> bytes:
        data = self._stream.recv(65536)
        if not data:
            raise PeerLost("the second process ended")
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            size = self._stream.recv_into(view)
            if not size:
                raise PeerLost("the second process ended")
            view = view[size:]


def measure(
    extent: Extent, plain: Plain, sources: dict[str, tuple[Source, Source]], moved_bytes: int
) -> Iterator[Finding]:
    """Yield the rates and latencies of a copy, of a plain socket, and of each transport.

    `sources` has, for each transport, the region that is moved and one of small blocks.
    Raises: `PeerLost` and `OSError` when the peer ends meanwhile.
    """
    num_blocks = moved_bytes // BLOCK_BYTES
    with (
        closing(SharedPool(num_blocks, BLOCK_BYTES)) as pool,
        closing(SharedPool(NUM_SMALL, SMALL_BYTES)) as small,
    ):
        seconds = _take_turns(_moves(plain, sources, pool.region), extent.repetitions)
        rates = {name: moved_bytes / taken for name, taken in seconds.items()}
        yield from _rate_findings(rates, num_blocks)
        latencies = _take_turns(_singles(plain, sources, small.region), LATENCIES)
        yield from _latency_findings(latencies)


def _moves(
    plain: Plain, sources: dict[str, tuple[Source, Source]], into: Region
) -> dict[str, Callable[[], object]]:
    """Return what moves the bytes: `memcpy`, `socket`, `KIND in 1` and `KIND in n` for each way."""
    count = into.num_blocks
    private = np.empty(into.blocks.shape, np.uint8)
    fill(private)
    whole = cut(np.arange(count), np.arange(count))
    # Every second block of the peer's, in no order: as many spans as there are blocks.
    rng = np.random.default_rng(0)
    scattered = cut(rng.permutation(count).astype(np.int64) * 2, np.arange(count))
    moves: dict[str, Callable[[], object]] = {
        "memcpy": lambda: ctypes.memmove(into.address, address_of(private), private.nbytes),
        "socket": lambda: plain.receive(into),
    }
    for kind, (source, _) in sources.items():
        moves[f"{kind} in 1"] = lambda source=source: source.pull(into, whole)  # type: ignore[misc]
        moves[f"{kind} in n"] = lambda source=source: source.pull(into, scattered)  # type: ignore[misc]
    return moves


def _singles(
    plain: Plain, sources: dict[str, tuple[Source, Source]], into: Region
) -> dict[str, Callable[[], object]]:
    one = cut(np.array([1]), np.array([2]))
    singles: dict[str, Callable[[], object]] = {"socket": plain.round_trip}
    for kind, (_, source) in sources.items():
        singles[kind] = lambda source=source: source.pull(into, one)  # type: ignore[misc]
    return singles


def _take_turns(moves: dict[str, Callable[[], object]], times: int) -> Measured:
    """Run each once to warm up, then all in turns; return the fewest seconds of each.

    The fewest, because what is asked is what the machine can do, not what else it does just now.
    """
    seconds: dict[str, list[float]] = {name: [] for name in moves}
    for number in range(times + 1):
        for name, move in moves.items():
            started = time.perf_counter()
            move()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: min(taken) for name, taken in seconds.items()}


def _rate_findings(rates: Measured, num_spans: int) -> Iterator[Finding]:
    size = f"{num_spans * BLOCK_BYTES >> 20} MiB"
    copied = rates["memcpy"]
    said = f"{copied / 1e9:.1f} GB/s: the most that one core copies"
    if copied < MEMCPY_BYTES_PER_S_MIN:
        yield warning("memory copy", said, _BUSY, bytes_per_s=copied)
    else:
        yield ok("memory copy", said, bytes_per_s=copied)
    yield ok("plain socket", f"{rates['socket'] / 1e9:.1f} GB/s, one stream",
             bytes_per_s=rates["socket"])  # fmt: skip
    for name, rate in rates.items():
        kind, _, spans = name.partition(" in ")
        if not spans:
            continue
        count = 1 if spans == "1" else num_spans
        limit = "socket" if kind == "tcp" else "memcpy"
        share = rate / rates[limit]
        label = f"{kind} in {count:,} span{'s' if count > 1 else ''}"
        said = f"{rate / 1e9:.1f} GB/s for {size}, {share:.2f} of {_LIMITS[limit]}"
        figures = {"bytes_per_s": rate, "share": share}
        if share < SHARE_MIN and kind in OURS:
            yield warning(label, said, f"is the native transport built? If so: {_BUSY}", **figures)
        else:
            yield ok(label, said, **figures)


def _latency_findings(seconds: Measured) -> Iterator[Finding]:
    for kind, taken in seconds.items():
        if kind != "socket":
            said = f"{taken * 1e6:.0f} µs for a pull of 4 KiB"
            if kind == "tcp":
                said += f", a plain round trip takes {seconds['socket'] * 1e6:.0f}"
            yield ok(f"{kind} latency", said, seconds=taken)


_LIMITS: Final = {"memcpy": "a copy in one process", "socket": "a plain socket"}
