"""Own a link between two processes that misbehaves as told: slow, stalled, cut, or flipping bits.

A proxy of bytes on the test's own event loop. It knows of what it carries no more than who speaks:
a *turn* is what one side says until the other one does. The handshake of `penstock.transport` is
four turns, then every pull is a turn of the reader (its request) and one of the owner (header and
blocks). Used by `proxied.py`, which puts one in front of every worker.
"""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, replace

READER, OWNER = "reader", "owner"
HANDSHAKE_TURNS = 4
REPLY_HEADER_BYTES = 64
REQUEST_HEADER_BYTES = 32
CHUNK_BYTES = 1 << 16
SLOW_CHUNK_BYTES = 1 << 12


@dataclass(frozen=True)
class Flip:
    """One bit to be flipped: in byte `at` of the next turn of `speaker` that is that long, or of
    the one `skip` turns later.
    """

    speaker: str = OWNER
    at: int = REPLY_HEADER_BYTES + 5000
    bit: int = 3
    is_in_handshake: bool = False
    skip: int = 0


class _Turns:
    """Whose turn it is on one connection, and how far it is."""

    def __init__(self) -> None:
        self.number = -1
        self.speaker = ""
        self.position = 0

    def take(self, speaker: str, num_bytes: int) -> int:
        """Count bytes of `speaker`; return where in its turn they begin."""
        if speaker != self.speaker:
            self.speaker, self.position = speaker, 0
            self.number += 1
        begin, self.position = self.position, self.position + num_bytes
        return begin


class Proxy:
    """Carries connections to `target`, from `open` to `close`; `address` is where it is called."""

    def __init__(self, target: str) -> None:
        self.stalled = asyncio.Event()
        """Set once something is held back."""
        self.num_carried = 0
        """Bytes that the owner's side has said and that were passed on."""
        self.num_connections = 0
        self.flips: list[Flip] = []
        """Still to be done; each is done once."""
        self.bytes_per_s: float | None = None
        self._target = target
        self._gate = asyncio.Event()
        self._gate.set()
        self._left: int | None = None
        self._is_cut = False
        self._free_at = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"

    def open(self) -> None:
        """Begin to carry, on the running loop. Who has called before now has waited."""
        self._spawn(self._listen())

    def stall(self, after_bytes: int = 0) -> None:
        """Pass nothing on any more, in either direction, once the owner has said that much."""
        self.stalled.clear()
        self._left = after_bytes
        if not after_bytes:
            self._gate.clear()

    def resume(self) -> None:
        """Pass on what was held back, and all that follows."""
        self._left = None
        self._gate.set()

    def cut(self) -> None:
        """Break every connection, and every new one, until `restore`."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def restore(self) -> None:
        """Carry connections again."""
        self._is_cut = False

    async def close(self) -> None:
        """Break everything and wait for its end."""
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _listen(self) -> None:
        def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._spawn(self._carry(reader, writer))

        async with await asyncio.start_server(join, sock=self._listener, limit=CHUNK_BYTES):
            await asyncio.get_running_loop().create_future()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        out = writer
        try:
            if self._is_cut:
                return
            host, port = self._target.rsplit(":", 1)
            back, out = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
            self._writers.add(out)
            turns = _Turns()
            there = asyncio.create_task(self._pump(READER, reader, out, turns))
            here = asyncio.create_task(self._pump(OWNER, back, writer, turns))
            both = {there, here}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except OSError:
            return
        finally:
            for each in (writer, out):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(
        self,
        speaker: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        turns: _Turns,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(SLOW_CHUNK_BYTES if self.bytes_per_s else CHUNK_BYTES):
                begin = turns.take(speaker, len(data))
                is_in_handshake = turns.number < HANDSHAKE_TURNS
                writer.write(
                    await self._held(speaker, self._flip(data, speaker, begin, is_in_handshake))
                )
                await writer.drain()

    def _flip(self, data: bytes, speaker: str, begin: int, is_in_handshake: bool) -> bytes:
        for flip in self.flips:
            here = flip.at - begin
            is_meant = (flip.speaker, flip.is_in_handshake) == (speaker, is_in_handshake)
            if is_meant and 0 <= here < len(data):
                self.flips.remove(flip)
                if flip.skip:
                    self.flips.append(replace(flip, skip=flip.skip - 1))
                    return data
                return data[:here] + bytes([data[here] ^ 1 << flip.bit]) + data[here + 1 :]
        return data

    async def _held(self, speaker: str, data: bytes) -> bytes:
        """Wait for as long as the link keeps these bytes."""
        if self._left is not None and speaker == OWNER:
            self._left -= len(data)
            if self._left < 0:
                self._gate.clear()
        if not self._gate.is_set():
            self.stalled.set()
            await self._gate.wait()
        if self.bytes_per_s:
            now = asyncio.get_running_loop().time()
            self._free_at = max(now, self._free_at) + len(data) / self.bytes_per_s
            await asyncio.sleep(self._free_at - now)
        if speaker == OWNER:
            self.num_carried += len(data)
        return data

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
