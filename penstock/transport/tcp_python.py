"""Both ends of TCP without a compiler: slower, and at the mercy of the interpreter lock.

Speaks the same wire as `native/`, so either end may be native. Called by `tcp.py` and
`tcp_owner.py` where `load_library` found nothing, which has said so by then.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Bytes2D, Region
from penstock.transport import wire
from penstock.transport.encoded import WireCodec, encode_rows, row_bytes
from penstock.transport.wire import Status

Question = Callable[[], int]


class _Ended(Exception):
    """The exchange cannot go on; `outcome` says why."""

    def __init__(self, outcome: int) -> None:
        super().__init__(outcome)
        self.outcome = outcome


# ------------------------------------------------------------------------------------- the reader


def read(
    stream: socket.socket,
    epoch: int,
    region: int,
    destination: Bytes2D,
    spans: SpanArray,
    limits_s: tuple[float, float],
) -> int:
    """Receive spans; return the bytes, or an outcome of `wire`. `limits_s`: silence, all of it."""
    deadline = time.monotonic() + limits_s[1]
    total = 0
    try:
        for start in range(0, len(spans), wire.RUNS_MAX):
            part = spans[start : start + wire.RUNS_MAX]
            runs = part[:, [0, 2]] * destination.shape[1]
            request = wire.REQUEST.pack(wire.MAGIC, wire.READ, 0, epoch, region, len(part), start)
            expected = int(runs[:, 1].sum())
            _exchange(stream, request + runs.astype("<u8").tobytes(), start, expected, limits_s[0])
            for _, to, count in part.tolist():
                _receive_into(stream, destination[to : to + count].data.cast("B"), deadline)
            total += expected
    except _Ended as ended:
        return ended.outcome
    return total


def notify(stream: socket.socket, epoch: int, text: bytes, silence_s: float) -> int:
    """Leave some bytes with the owner; return 0 or an outcome of `wire`."""
    request = wire.REQUEST.pack(wire.MAGIC, wire.NOTIFY, 0, epoch, 0, len(text), 0)
    try:
        _exchange(stream, request + text, 0, 0, silence_s)
    except _Ended as ended:
        return ended.outcome
    return 0


def _exchange(
    stream: socket.socket, request: bytes, request_id: int, expected: int, silence_s: float
) -> None:
    """Send a request and take the reply's header in. Raises: `_Ended`."""
    stream.settimeout(silence_s)
    _send(stream, request)
    reply = bytearray(wire.REPLY.size)
    _receive_into(stream, memoryview(reply), time.monotonic() + silence_s)
    magic, status, answered_id, num_bytes = wire.REPLY.unpack(reply)
    if magic != wire.MAGIC or answered_id != request_id or status not in list(Status):
        raise _Ended(wire.NONSENSE)
    if status != Status.OK:
        raise _Ended(wire.REFUSED - status)
    if num_bytes != expected:
        raise _Ended(wire.NONSENSE)


def _send(stream: socket.socket, data: bytes | memoryview) -> None:
    try:
        stream.sendall(data)
    except TimeoutError:
        raise _Ended(wire.LATE) from None
    except OSError:
        raise _Ended(wire.LOST) from None


def _receive_into(stream: socket.socket, into: memoryview, deadline: float) -> None:
    while into:
        try:
            received = stream.recv_into(into)
        except TimeoutError:
            raise _Ended(wire.LATE) from None
        except OSError:
            raise _Ended(wire.LOST) from None
        if not received:
            raise _Ended(wire.LOST)
        into = into[received:]
        if into and time.monotonic() > deadline:
            raise _Ended(wire.LATE)


# -------------------------------------------------------------------------------------- the owner


@dataclass(eq=False)
class _Served:
    stream: socket.socket
    thread: threading.Thread


class _Encoded:
    """A region as rows that are made when they are read."""

    def __init__(self, region: Region, codec: WireCodec) -> None:
        self.row_bytes = row_bytes(codec)
        self.capacity_bytes = region.num_blocks * self.row_bytes
        self._region, self._codec = region, codec

    def send(self, stream: socket.socket, first: int, count: int) -> None:
        """Send bytes of the rows: streams share bytes, so they may begin and end in a row."""
        end = first + count
        for row in range(first // self.row_bytes, -(-end // self.row_bytes)):
            begin = row * self.row_bytes
            made = encode_rows(self._codec, self._region, [row]).data.cast("B")
            _send(stream, made[max(0, first - begin) : end - begin])


class PythonServer:
    """Serves reads from threads that need the interpreter: while the owner computes, readers wait.

    The same calls as `tcp_owner.NativeServer`.
    """

    def __init__(self, epoch: int, silence_s: float, connections_max: int) -> None:
        self.counts = [0] * (3 + len(Status) - 1)
        self._epoch = epoch
        self._silence_s = silence_s
        self._connections_max = connections_max
        self._regions: list[Region | _Encoded] = []
        self._served: list[_Served] = []
        self._heard: deque[bytes] = deque()
        self._lock = threading.Lock()

    def add(self, region: Region) -> int:
        """Let a region be read; return its index."""
        self._regions.append(region)
        return len(self._regions) - 1

    def add_encoded(self, index: int, codec: WireCodec) -> int | None:
        """Let a region be read encoded as well; return the index of its rows."""
        region = self._regions[index]
        assert isinstance(region, Region), index
        self._regions.append(_Encoded(region, codec))
        return len(self._regions) - 1

    def serve(self, stream: socket.socket) -> bool:
        """Serve an authenticated connection until it ends; False when there are too many."""
        with self._lock:
            self._served = [served for served in self._served if served.thread.is_alive()]
            if len(self._served) >= self._connections_max:
                return False
            stream.settimeout(self._silence_s)
            thread = threading.Thread(target=self._run, args=(stream,), daemon=True)
            thread.start()
            self._served.append(_Served(stream, thread))
        return True

    def heard(self) -> bytes | None:
        """Take one notification out."""
        return self._heard.popleft() if self._heard else None

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            for served in self._served:
                with suppress(OSError):  # ended meanwhile
                    served.stream.shutdown(socket.SHUT_RDWR)
                served.thread.join()
            self._served = []

    def _run(self, stream: socket.socket) -> None:
        with stream:
            try:
                while self._answer(stream):
                    pass
            except _Ended:
                return

    def _answer(self, stream: socket.socket) -> bool:
        header = bytearray(wire.REQUEST.size)
        stream.settimeout(None)
        _receive_into(stream, memoryview(header)[:1], float("inf"))
        stream.settimeout(self._silence_s)
        deadline = time.monotonic() + 12 * self._silence_s
        _receive_into(stream, memoryview(header)[1:], deadline)
        magic, operation, zero, epoch, index, count, request_id = wire.REQUEST.unpack(header)
        limit, size = {
            wire.READ: (wire.RUNS_MAX, wire.RUN.size),
            wire.NOTIFY: (wire.TEXT_MAX, 1),
        }.get(operation, (0, 0))
        if magic != wire.MAGIC or zero or not 0 < count <= limit:
            return self._reply(stream, Status.MALFORMED, request_id)
        body = bytearray(count * size)
        _receive_into(stream, memoryview(body), deadline)
        if epoch != self._epoch:
            return self._reply(stream, Status.WRONG_EPOCH, request_id)
        if operation == wire.NOTIFY:
            return self._hear(stream, bytes(body), request_id)
        return self._send_blocks(stream, index, body, request_id)

    def _hear(self, stream: socket.socket, text: bytes, request_id: int) -> bool:
        if len(self._heard) >= wire.HEARD_MAX:
            return self._reply(stream, Status.BUSY, request_id)
        self._heard.append(text)
        self.counts[2] += 1
        return self._reply(stream, Status.OK, request_id)

    def _send_blocks(
        self, stream: socket.socket, index: int, body: bytearray, request_id: int
    ) -> bool:
        if index >= len(self._regions):
            return self._reply(stream, Status.NO_REGION, request_id)
        region = self._regions[index]
        runs = list(wire.RUN.iter_unpack(body))
        is_inside = all(count and first + count <= region.capacity_bytes for first, count in runs)
        num_bytes = sum(count for _, count in runs)
        if not is_inside or num_bytes > wire.READ_BYTES_MAX:
            return self._reply(stream, Status.OUT_OF_BOUNDS, request_id)
        _send(stream, wire.REPLY.pack(wire.MAGIC, Status.OK, request_id, num_bytes))
        for first, count in runs:
            if isinstance(region, _Encoded):
                region.send(stream, first, count)
            else:
                _send(stream, region.blocks.data.cast("B")[first : first + count])
        self.counts[0] += 1
        self.counts[1] += num_bytes
        return True

    def _reply(self, stream: socket.socket, status: Status, request_id: int) -> bool:
        """Answer without bytes; False when the connection is to end, as it is after a refusal."""
        if status != Status.OK:
            self.counts[2 + status] += 1
        _send(stream, wire.REPLY.pack(wire.MAGIC, status, request_id, 0))
        return status == Status.OK
