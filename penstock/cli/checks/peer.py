"""`Peer`: a process with memory to read, for the checks of the hand-off; also `python -m` this.

It registers two regions as any program would and listens at a socket: whoever knows the cluster key
is told how to reach them and, for comparison, is sent the same bytes without Penstock, a byte for a
byte, and what the clocks say. `handoff.py` starts it as a process of its own, which reads a key,
says where it listens and ends when its input does; `penstock doctor --listen` is it on another
host.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import block_hash, root_hash
from penstock.core.errors import BackendUnavailable, PenstockError, StartupFailed
from penstock.core.types import MIB
from penstock.core.version import VERSION
from penstock.transport import Agent
from penstock.transport.handshake import admit
from penstock.transport.nixl_agent import NIXL, is_installed

BLOCK_BYTES: Final = 64 << 10
SMALL_BYTES: Final = 4 << 10
NUM_SMALL: Final = 64
MOVED_BYTES: Final = 64 * MIB
CALLERS_MAX: Final = 8
HANDSHAKE_S: Final = 5.0
SILENCE_S: Final = 120.0

SEND: Final = b"s"
"""Asks for as many bytes as a transfer moves."""
ANSWER: Final = b"a"
"""Asks for one byte."""
CLOCK: Final = b"c"
"""Asks for the monotonic clock and the one of the day, 8 bytes each."""
FACTS: Final = b"f"
"""Asks for a line of JSON that says what this process is and how its memory is reached."""

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def fill(blocks: npt.NDArray[np.uint8]) -> None:
    """Write contents of which no two words are equal."""
    words = np.arange(blocks.nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    blocks.reshape(-1).view(np.uint64)[:] = words


def name_of_a_block() -> str:
    """Return how a certain block is called here: in every process the same, or nothing is found."""
    return block_hash(root_hash("doctor"), range(32)).hex()


def host_id() -> str:
    """Return what is the same in all processes of a running host, and in no other."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


class Peer:
    """Memory to read, and a socket to ask at; from construction to the end of the `with` block.

    Raises: `StartupFailed` when it cannot listen there.
    """

    def __init__(
        self, key: bytes, host: str = "127.0.0.1", port: int = 0, moved_bytes: int = MOVED_BYTES
    ) -> None:
        self._key = key
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise StartupFailed(f"cannot listen at {host}:{port}: {error}") from error
        self.port: int = self._listener.getsockname()[1]
        """Where it listens."""
        try:
            self._agent = _agent(key, host)
        except PenstockError:
            self._listener.close()
            raise
        num_blocks = moved_bytes // BLOCK_BYTES
        moved = self._agent.allocate(2 * num_blocks, BLOCK_BYTES).blocks
        fill(moved)
        fill(self._agent.allocate(NUM_SMALL, SMALL_BYTES).blocks)
        self._content = moved[:num_blocks].reshape(-1).data
        self._facts = {
            "version": VERSION,
            "host": host_id(),
            "pid": os.getpid(),
            "descriptor": b64encode(self._agent.descriptor()).decode(),
            "moved_bytes": moved_bytes,
            "name": name_of_a_block(),
        }

    def __enter__(self) -> "Peer":
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):  # it wakes who waits for a caller
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._agent.close()

    def _listen(self) -> None:
        room = threading.Semaphore(CALLERS_MAX)
        with suppress(OSError):  # the listener is closed: the end
            while True:
                stream, _ = self._listener.accept()
                if room.acquire(blocking=False):
                    threading.Thread(target=self._serve, args=(stream, room), daemon=True).start()
                else:
                    stream.close()

    def _serve(self, stream: socket.socket, room: threading.Semaphore) -> None:
        """Answer one caller, if it knows the key, until it hangs up or says nothing."""
        try:
            with stream, suppress(OSError, PenstockError):
                admit(stream, self._key, HANDSHAKE_S)
                stream.settimeout(SILENCE_S)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while asked := stream.recv(1):
                    stream.sendall(self._answer(asked))
        finally:
            room.release()

    def _answer(self, asked: bytes) -> bytes | memoryview:
        if asked == SEND:
            return self._content
        if asked == CLOCK:
            return struct.pack("<2q", time.monotonic_ns(), time.time_ns())
        if asked == FACTS:
            return json.dumps(self._facts).encode() + b"\n"
        return asked


def _agent(key: bytes, host: str) -> Agent:
    """Serve reads in every way there is; without NIXL where it cannot start."""
    if is_installed():
        with suppress(BackendUnavailable):
            return Agent("peer", transport=NIXL, host=host, key=key)
    return Agent("peer", host=host, key=key)


def main() -> None:
    """Be the peer until the input ends."""
    key = bytes.fromhex(sys.stdin.readline())
    with Peer(key, moved_bytes=int(sys.argv[1])) as peer:
        print(peer.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
