"""The process whose memory is read in `transfer.py`: an agent of ours, and a plain socket.

Commands come on stdin: `busy` and `idle` start and end a Python thread that computes without a
pause, `burn` does nothing but compute (a process of its own). It ends with its stdin. `Owner` is
what the benchmark has in hand of it.
"""

import json
import secrets
import socket
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import numpy.typing as npt
from transfer_shapes import SHAPES, SINGLES, SINGLES_COUNT

from penstock.transport import Agent
from penstock.transport.nixl_agent import is_installed

VECTORS_MAX = 1024


class Owner:
    """The process that is read."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self.process = start_owner(self.key.hex())
        facts = json.loads(self.process.stdout.readline())
        self.descriptor, self.port = b64decode(facts["descriptor"]), facts["port"]

    def tell(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline()

    def close(self) -> None:
        self.process.communicate()


def start_owner(argument: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, __file__, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def pieces(pool: npt.NDArray[np.uint8], blocks: npt.NDArray[np.int64]) -> list[list[memoryview]]:
    """Return the blocks as lists of vectors that one system call takes."""
    views = [pool[block].data for block in blocks.tolist()]
    return [views[i : i + VECTORS_MAX] for i in range(0, len(views), VECTORS_MAX)]


def serve_plainly(listener: socket.socket, pools: list[npt.NDArray[np.uint8]]) -> None:
    """Send what two bytes ask for: a shape, or one block; a thread a caller. Never returns."""
    answers = [pieces(pool, shape.blocks[0]) for pool, shape in zip(pools, SHAPES, strict=True)]
    singles = [pieces(pools[index], np.arange(SINGLES_COUNT))[0] for index in SINGLES.values()]
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=answer, args=(stream, answers, singles), daemon=True).start()


def answer(
    stream: socket.socket,
    answers: list[list[list[memoryview]]],
    singles: list[list[memoryview]],
) -> None:
    """Serve one caller until it hangs up."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while asked := stream.recv(2):
        if asked[0] < len(answers):
            for vectors in answers[asked[0]]:
                send_all(stream, vectors)
        else:
            stream.send(singles[asked[0] - len(answers)][asked[1]])


def send_all(stream: socket.socket, vectors: list[memoryview]) -> None:
    """Send all of it: with several at once a call may take only a part."""
    sent, expected = stream.sendmsg(vectors), sum(map(len, vectors))
    if sent < expected:
        stream.sendall(b"".join(vectors)[sent:])


def compute(is_over: threading.Event) -> None:
    """Hold the interpreter lock as much as one thread can."""
    number = 1
    while not is_over.is_set():
        for _ in range(100_000):
            number = (number * 1103515245 + 12345) & 0x7FFFFFFF


def main() -> None:
    """Serve until stdin ends."""
    if sys.argv[1:] == ["burn"]:
        compute(threading.Event())
    # An agent for NIXL is read over shared memory and TCP as well.
    transport = "nixl" if is_installed() else "auto"
    with Agent("owner", transport=transport, key=bytes.fromhex(sys.argv[1])) as agent:
        pools = []
        for shape in SHAPES:
            region = agent.allocate(shape.num_blocks, shape.block_bytes)
            shape.fill(region.blocks)
            pools.append(region.blocks)
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve_plainly, args=(listener, pools), daemon=True).start()
        facts = {
            "descriptor": b64encode(agent.descriptor()).decode(),
            "port": listener.getsockname()[1],
        }
        print(json.dumps(facts), flush=True)
        is_over = threading.Event()
        for line in sys.stdin:
            if line.strip() == "busy":
                is_over.clear()
                threading.Thread(target=compute, args=(is_over,), daemon=True).start()
            else:
                is_over.set()
            print("done", flush=True)


if __name__ == "__main__":
    main()
