"""`python -m` this: another process with memory to read, for the checks of the hand-off.

It reads a key, registers two regions as any program would, says in a line of JSON how to reach
them, and answers at a plain socket for comparison: what the same bytes take without Penstock, a
round trip, and what its clock says. It ends when its input does. `handoff.py` starts it.
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
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import block_hash, root_hash
from penstock.core.errors import BackendUnavailable
from penstock.transport import Agent
from penstock.transport.nixl_agent import NIXL, is_installed

BLOCK_BYTES: Final = 64 << 10
SMALL_BYTES: Final = 4 << 10
NUM_SMALL: Final = 64

SEND: Final = b"s"
"""Asks for as many bytes as a transfer moves."""
ANSWER: Final = b"a"
"""Asks for one byte."""
CLOCK: Final = b"c"
"""Asks for the monotonic clock, 8 bytes."""


def fill(blocks: npt.NDArray[np.uint8]) -> None:
    """Write contents of which no two words are equal."""
    words = np.arange(blocks.nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    blocks.reshape(-1).view(np.uint64)[:] = words


def name_of_a_block() -> str:
    """Return how a certain block is called here: in every process the same, or nothing is found."""
    return block_hash(root_hash("doctor"), range(32)).hex()


def main() -> None:
    """Be the peer until the input ends."""
    num_blocks = int(sys.argv[1]) // BLOCK_BYTES
    with (
        _agent(bytes.fromhex(sys.stdin.readline())) as agent,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        moved = agent.allocate(2 * num_blocks, BLOCK_BYTES).blocks
        small = agent.allocate(NUM_SMALL, SMALL_BYTES).blocks
        fill(moved)
        fill(small)
        facts = {
            "pid": os.getpid(),
            "descriptor": b64encode(agent.descriptor()).decode(),
            "port": listener.getsockname()[1],
            "name": name_of_a_block(),
        }
        content = moved[:num_blocks].reshape(-1).data
        threading.Thread(target=_answer, args=(listener, content), daemon=True).start()
        print(json.dumps(facts), flush=True)
        sys.stdin.read()


def _agent(key: bytes) -> Agent:
    """Serve reads in every way there is; without NIXL where it cannot start."""
    if is_installed():
        with suppress(BackendUnavailable):
            return Agent("peer", transport=NIXL, key=key)
    return Agent("peer", key=key)


def _answer(listener: socket.socket, content: memoryview) -> None:
    """Answer one caller. An `OSError` is its end, or ours."""
    with suppress(OSError):
        stream, _ = listener.accept()
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := stream.recv(1):
            if asked == SEND:
                stream.sendall(content)
            elif asked == CLOCK:
                stream.sendall(struct.pack("<q", time.monotonic_ns()))
            else:
                stream.sendall(asked)


if __name__ == "__main__":
    main()
