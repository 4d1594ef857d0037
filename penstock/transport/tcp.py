"""The way to memory on other hosts: reads over TCP, straight from the socket into our pool.

A connection to a peer is a few sockets, opened and authenticated at the first pull; a pull is
shared out among them and received in one native call. When what was open turns out to be cut, it is
opened anew, once: a read can be repeated. `tcp_owner.py` is the other end.
"""

import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Final

from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import PeerMemory, Region, described_blocks
from penstock.transport import tcp_python, wire
from penstock.transport.handshake import prove
from penstock.transport.native.library import Reading, address_of_own, load_library, read

TCP: Final = "tcp"
STREAMS_MAX: Final = 4
SILENCE_S: Final = 5.0
"""The longest that a peer may say nothing in the middle of a pull, or while it is called."""
BYTES_PER_S_MIN: Final = 4 << 20
"""A pull that is slower than this, and than `SILENCE_S` before, is given up."""


class Tcp:
    """The way to peers that serve reads at an address. `silence_s` bounds every wait for a byte.

    `num_streams` is how many sockets share a pull, `usual_streams()` by default.
    """

    kind: Final = TCP

    def __init__(
        self, key: bytes, *, num_streams: int | None = None, silence_s: float = SILENCE_S
    ) -> None:
        self._key = key
        self._num_streams = num_streams or usual_streams()
        self._silence_s = silence_s
        self._connections: dict[tuple[str, int], Connection] = {}
        self._lock = threading.Lock()

    def open(self, peer: PeerMemory, index: int) -> "ServedRegion":
        """Connect with a peer.

        Raises: `PeerLost` when it serves no reads, cannot be reached or does not prove itself.
        """
        connection = self.connection(peer)
        connection.open()
        return ServedRegion(connection, peer, index)

    def connection(self, peer: PeerMemory) -> "Connection":
        """Return what is, or will be, open to a peer. Raises: `PeerLost` when it has no address."""
        addresses = [endpoint.address for endpoint in peer.endpoints if endpoint.kind == TCP]
        if not addresses:
            raise PeerLost("it serves no reads over TCP")
        with self._lock:
            if (peer.name, peer.epoch) not in self._connections:
                self._connections[peer.name, peer.epoch] = Connection(
                    peer,
                    addresses[0],
                    self._key,
                    num_streams=self._num_streams,
                    silence_s=self._silence_s,
                )
            return self._connections[peer.name, peer.epoch]

    def forget(self, name: str, epoch: int) -> None:
        """Hang up on this incarnation; a pull under way fails."""
        with self._lock:
            connection = self._connections.pop((name, epoch), None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Hang up on everybody."""
        with self._lock:
            connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close()


class ServedRegion:
    """A region of a peer that is read over its connection."""

    def __init__(self, connection: "Connection", peer: PeerMemory, index: int) -> None:
        self._connection = connection
        self._index = index
        self.num_blocks = described_blocks(peer.regions[index])
        self.block_bytes = peer.regions[index].block_bytes
        self.name = TCP if load_library() is not None else f"{TCP} (python)"

    def pull(self, destination: Region, spans: SpanArray) -> None:
        """Receive spans that lie inside both regions.

        Raises: `PeerLost` when the peer is gone or refuses, `DeadlineExceeded` when it is silent.
        """
        self._connection.pull(self._index, destination, spans)


class Connection:
    """The sockets to one incarnation of a peer. One pull at a time; others wait for it."""

    def __init__(
        self, peer: PeerMemory, address: str, key: bytes, *, num_streams: int, silence_s: float
    ) -> None:
        self._name = peer.name
        self._epoch = peer.epoch
        self._address = address
        self._key = key
        self._num_streams = num_streams
        self._silence_s = silence_s
        self._streams: list[socket.socket] = []
        self._reading = Reading(
            epoch=peer.epoch,
            patience_ms=round(silence_s * 1000),
            bytes_per_ms_min=BYTES_PER_S_MIN // 1000,
        )
        self._is_closed = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Connect now, if it is not open. Raises: `PeerLost`, also for a silent peer."""
        with self._lock:
            self._dial()

    def pull(self, index: int, destination: Region, spans: SpanArray) -> None:
        """Receive spans of region `index`. Raises: `PeerLost`, `DeadlineExceeded`."""
        self._ask(lambda: self._read(index, destination, spans))

    def notify(self, text: bytes) -> None:
        """Leave some bytes with the peer. Raises: `PeerLost`, `DeadlineExceeded`."""
        assert 0 < len(text) <= wire.TEXT_MAX, len(text)
        self._ask(lambda: self._notify(text))

    def close(self) -> None:
        """Hang up; a pull under way fails. Does not wait for it."""
        self._is_closed = True
        for stream in tuple(self._streams):
            _shut(stream)
        if self._lock.acquire(blocking=False):
            try:
                self._hang_up()
            finally:
                self._lock.release()

    def _ask(self, question: "tcp_python.Question") -> None:
        with self._lock:
            was_open = bool(self._streams)
            self._dial()
            outcome = question()
            if outcome == wire.LOST and was_open and not self._is_closed:
                self._hang_up()
                self._dial()
                outcome = question()
            if outcome < 0 or self._is_closed:
                self._hang_up()
        if outcome < 0:
            raise self._error(outcome)

    def _read(self, index: int, destination: Region, spans: SpanArray) -> int:
        library = load_library()
        if library is None:
            num_bytes = int(spans[:, 2].sum()) * destination.block_bytes
            limits = (self._silence_s, self._silence_s + num_bytes / BYTES_PER_S_MIN)
            return tcp_python.read(
                self._streams[0], self._epoch, index, destination.blocks, spans, limits
            )
        reading = self._reading
        reading.region = index
        reading.destination = destination.address
        reading.block_bytes = destination.block_bytes
        reading.spans = address_of_own(spans)
        reading.num_spans = len(spans)
        return read(library, reading)

    def _notify(self, text: bytes) -> int:
        library = load_library()
        stream = self._streams[0]
        if library is None:
            return tcp_python.notify(stream, self._epoch, text, self._silence_s)
        deadline_ms = round(2 * self._silence_s * 1000)
        return int(
            library.penstock_notify(stream.fileno(), self._epoch, text, len(text), deadline_ms)
        )

    def _dial(self) -> None:
        if self._is_closed:
            raise PeerLost(f"{self._name} was forgotten")
        if self._streams:
            return
        try:
            for _ in range(self._num_streams):
                self._streams.append(call(self._address, self._key, self._silence_s))
            numbers = [stream.fileno() for stream in self._streams]
            self._reading.streams = (Reading.Streams * len(numbers))(*numbers)
            self._reading.num_streams = len(numbers)
        except (PeerLost, DeadlineExceeded) as error:
            self._hang_up()
            raise PeerLost(f"{self._name} at {self._address}: {error}") from error

    def _hang_up(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams = []

    def _error(self, outcome: int) -> PeerLost | DeadlineExceeded:
        who = f"{self._name} at {self._address}"
        match outcome:
            case wire.LATE:
                return DeadlineExceeded(f"{who} was silent or slow for {self._silence_s:.1f} s")
            case wire.LOST:
                return PeerLost(f"the connection with {who} was lost")
            case wire.NONSENSE:
                return PeerLost(f"{who} does not answer as a peer does")
        return PeerLost(f"{who} refuses: {wire.REFUSALS[wire.Status(wire.REFUSED - outcome)]}")


def usual_streams() -> int:
    """Return how many streams pay: each keeps a core busy at either end, and with a single one a
    core at one end waits for the other too often. Measured: bench/transfer.py.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(STREAMS_MAX, cores, max(2, cores // 2))


def call(address: str, key: bytes, timeout_s: float) -> socket.socket:
    """Connect with an owner and authenticate both sides; return a socket whose every wait ends.

    Raises: `PeerLost`, `DeadlineExceeded`.
    """
    host, _, port = address.rpartition(":")
    try:
        stream = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    except TimeoutError:
        raise DeadlineExceeded("nobody answers") from None
    except (OSError, ValueError, OverflowError) as error:
        raise PeerLost(f"it cannot be called: {error}") from error
    try:
        tune(stream)
        prove(stream, key, timeout_s)
    except (PeerLost, DeadlineExceeded):
        stream.close()
        raise
    stream.settimeout(None)
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        stream.setsockopt(socket.SOL_SOCKET, option, limit)
    return stream


def tune(stream: socket.socket) -> None:
    """Set what both ends want: no waiting for more to send, buffers, a word when a host is gone."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _shut(stream: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile, or never connected
        stream.shutdown(socket.SHUT_RDWR)
