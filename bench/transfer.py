"""How fast blocks cross from one process into another, and what else this machine could do.

64 MiB in 1, 1,024 and 16,384 pieces, at random places of two pools of 128 MiB, and single pieces
of 4 and 64 KiB: ours over shared memory and over TCP, through the public `Agent`, planning
included; a memcpy in one process, a loop of memcpy out of the shared pool, a plain loopback socket;
NIXL and Mooncake where an interpreter that has them is named. All in one run, in turns, so that a
drift of the machine hits everybody; who is not measured is stopped, since some of them spin. Every
byte is verified. Pools are touched before; what the first touch costs is a figure of its own. Where
this interpreter has NIXL, our way through it is measured too (`nixl_way`, against `nixl` itself).

Then: several readers at once, beside as many plain loops and sockets in their place; and an owner
whose Python computes without a pause, beside the same load in a process of its own (1 is no
difference) and, over TCP, beside a plain socket that the same owner serves.

    python bench/transfer.py [--peers PYTHON] [--quick] [--output FILE]
"""

import argparse
import ctypes
import json
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import msgspec
import numpy as np
import numpy.typing as npt
from report import Report
from transfer_owner import Owner, pieces, start_owner
from transfer_peers import KINDS
from transfer_shapes import MOVED_BYTES, SHAPES, SINGLES, SINGLES_COUNT, Shape, empty_pool

from penstock.native.build import Recipe, build
from penstock.transfer.region import PeerMemory, Region
from penstock.transport import Agent
from penstock.transport.nixl_agent import is_installed
from penstock.transport.shm import open_peer

FOLDER = Path(__file__).parent
REPETITIONS = 5
AT_ONCE = 4

Numbers = npt.NDArray[np.int64]
Json = Any

RATIOS = {
    "shm": ("memcpy", "gather", "nixl", "nixl_default"),
    "tcp": ("socket", "mooncake", "nixl_tcp", "nixl_tcp_default"),
    "nixl_way": ("nixl", "nixl_default"),
}


class Ours:
    """One transport of ours, through the library's front door."""

    def __init__(self, transport: str, descriptor: bytes, key: bytes) -> None:
        self.agent = Agent(transport=transport, key=key)
        self.peer = self.agent.connect(descriptor)
        self.regions = [self.agent.allocate(s.num_blocks, s.block_bytes) for s in SHAPES]
        self.pools = [region.blocks for region in self.regions]
        self.blocks = [shape.blocks for shape in SHAPES]

    def first_touch(self) -> float:
        """Pull into pages that nobody has touched; return the seconds."""
        seconds = self.move(0)
        for pool in self.pools:
            pool[:] = 0
        return seconds

    def move(self, index: int) -> float:
        source, destination = self.blocks[index]
        started = time.perf_counter()
        self.agent.pull(self.peer, source, self.regions[index], destination, region=index)
        return time.perf_counter() - started

    def singles(self, index: int, count: int) -> list[float]:
        region, seconds = self.regions[index], []
        for i in range(count):
            started = time.perf_counter()
            self.agent.pull(self.peer, [i], region, [i], region=index)
            seconds.append(time.perf_counter() - started)
        return seconds


class Loop:
    """A native loop of memcpy, out of `sources`."""

    def __init__(self, sources: list[Any]) -> None:
        library = ctypes.CDLL(
            str(build(Recipe("gather", "the benchmark's loop", FOLDER / "native")))
        )
        self.gather = library.gather
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self.gather.argtypes = [pointer, pointer, number, pointer, pointer, number]
        self.sources = sources
        self.pools = [empty_pool(shape) for shape in SHAPES]
        self.blocks = [shape.blocks for shape in SHAPES]

    def move(self, index: int) -> float:
        return self._gather(index, *self.blocks[index])

    def singles(self, index: int, count: int) -> list[float]:
        numbers = np.arange(count)
        return [self._gather(index, numbers[i : i + 1], numbers[i : i + 1]) for i in range(count)]

    def _gather(self, index: int, source: Numbers, destination: Numbers) -> float:
        addresses = (
            self.sources[index].ctypes.data, self.pools[index].ctypes.data,
            SHAPES[index].block_bytes, source.ctypes.data, destination.ctypes.data, len(source),
        )  # fmt: skip
        started = time.perf_counter()
        self.gather(*addresses)
        return time.perf_counter() - started


class Plain:
    """A socket and nothing else: the owner sends vectors, we receive them in place."""

    def __init__(self, port: int) -> None:
        self.stream = socket.create_connection(("127.0.0.1", port))
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pools = [empty_pool(shape) for shape in SHAPES]
        self.vectors = [
            pieces(pool, shape.blocks[1]) for pool, shape in zip(self.pools, SHAPES, strict=True)
        ]

    def move(self, index: int) -> float:
        return self._ask(bytes([index, 0]), self.vectors[index])

    def singles(self, index: int, count: int) -> list[float]:
        asked = len(SHAPES) + list(SINGLES.values()).index(index)
        pool = self.pools[index]
        return [self._ask(bytes([asked, i]), [[pool[i].data]]) for i in range(count)]

    def _ask(self, asked: bytes, vectors: list[list[memoryview]]) -> float:
        started = time.perf_counter()
        self.stream.send(asked)
        for part in vectors:
            expected = sum(map(len, part))
            received = self.stream.recvmsg_into(part, 0, socket.MSG_WAITALL)[0]
            assert received == expected, (received, expected)
        return time.perf_counter() - started


class Foreign:
    """A peer's two processes; stopped while others are measured, since some of them spin."""

    def __init__(self, kind: str, python: str) -> None:
        program = [python, str(FOLDER / "transfer_peers.py"), kind]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE, "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL, "text": True,
        }  # fmt: skip
        self.target = subprocess.Popen([*program, "target"], **pipes)
        facts = self._line(self.target, "facts")
        self.initiator = subprocess.Popen([*program, "initiator"], **pipes)
        self._say(json.dumps(facts))
        self.move(0)
        self.stop()

    def move(self, index: int) -> float:
        return float(self._ask(str(index))[0])

    def singles(self, index: int, count: int) -> list[float]:
        return [float(seconds) for seconds in self._ask(f"single {index} {count}")]

    def is_right(self, index: int) -> bool:
        return bool(self._ask(f"check {index}")[0])

    def stop(self) -> None:
        for process in (self.target, self.initiator):
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        for process in (self.target, self.initiator):
            process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for process in (self.target, self.initiator):
            process.kill()
            process.communicate()

    def _ask(self, command: str) -> list[Any]:
        self._say(command)
        answer: list[Any] = self._line(self.initiator, "answer")
        return answer

    def _say(self, line: str) -> None:
        self.initiator.stdin.write(line + "\n")
        self.initiator.stdin.flush()

    def _line(self, process: "subprocess.Popen[str]", word: str) -> Json:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith(word + " "):
                return json.loads(line[len(word) :])
        raise RuntimeError(f"{process.args} ended")


Method = Ours | Loop | Plain | Foreign


def assert_right(method: "Method", shape: Shape, index: int, name: str) -> None:
    is_right = (
        method.is_right(index)
        if isinstance(method, Foreign)
        else shape.is_right(method.pools[index])
    )
    assert is_right, f"{name} moved wrong bytes in {shape.name}"


@contextmanager
def running(method: Method) -> Iterator[None]:
    """Let a peer's processes run meanwhile; ours have nothing that spins."""
    if isinstance(method, Foreign):
        method.go_on()
    yield
    if isinstance(method, Foreign):
        method.stop()


def measure(report: Report, methods: dict[str, Method], passes: int) -> None:
    """Run all in turns; add rates, latencies and ratios of neighbours in time."""
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    for number in range(passes):
        for index, shape in enumerate(SHAPES):
            seconds: dict[str, list[float]] = {name: [] for name in methods}
            # Who is compared runs within a fraction of a second of the other, and nobody always
            # after the same one.
            names = list(methods)
            for _ in range(REPETITIONS):
                names = names[1:] + names[:1]
                for name in names:
                    with running(methods[name]):
                        seconds[name].append(methods[name].move(index))
            for name, method in methods.items():
                rate = MOVED_BYTES / statistics.median(seconds[name]) / 1e9
                rates.setdefault(f"{name}_{shape.name}", []).append(rate)
                if number in (0, passes - 1):
                    with running(method):
                        assert_right(method, shape, index, name)
        for size, index in SINGLES.items():
            for name, method in methods.items():
                with running(method):
                    median = statistics.median(method.singles(index, SINGLES_COUNT)) * 1e6
                latencies.setdefault(f"{name}_{size}", []).append(median)
    for key, runs in rates.items():
        report.add(f"gb_per_s_{key}", runs, "GB/s")
    for key, runs in latencies.items():
        report.add(f"latency_us_{key}", runs, "us")
    for ours, others in RATIOS.items():
        for other in others:
            for shape in SHAPES:
                pair = [rates.get(f"{name}_{shape.name}") for name in (ours, other)]
                if pair[0] and pair[1]:
                    ratios = [a / b for a, b in zip(*pair, strict=True)]
                    report.add(f"{ours}_over_{other}_{shape.name}", ratios)


def measure_at_once(report: Report, owner: Owner, sources: list[Any], passes: int) -> None:
    """Several readers in one process, each with a connection and a pool of its own: beside one of
    them alone, and beside as many loops of memcpy and plain sockets in their place.
    """
    rivals: dict[str, tuple[str, list[Loop] | list[Plain]]] = {
        "shm": ("gather", [Loop(sources) for _ in range(AT_ONCE)]),
        "tcp": ("socket", [Plain(owner.port) for _ in range(AT_ONCE)]),
    }
    for transport, (rival, others) in rivals.items():
        readers = [Ours(transport, owner.descriptor, owner.key) for _ in range(AT_ONCE)]
        for reader in readers:
            reader.first_touch()
        for index, shape in enumerate(SHAPES):
            over_one, over_rival = [], []
            for _ in range(passes):
                alone = readers[0].move(index)
                theirs = run_all([partial(other.move, index) for other in others])
                together = run_all([partial(reader.move, index) for reader in readers])
                over_one.append(AT_ONCE * alone / together)
                over_rival.append(theirs / together)
            for reader in (*readers, *others):
                assert shape.is_right(reader.pools[index])
            report.add(f"{transport}_{AT_ONCE}_at_once_over_1_{shape.name}", over_one)
            report.add(f"{transport}_over_{rival}_{AT_ONCE}_at_once_{shape.name}", over_rival)
        for reader in readers:
            reader.agent.close()


def run_all(jobs: list[Callable[[], float]]) -> float:
    """Run them at once; return the seconds until the last is done."""
    threads = [threading.Thread(target=job) for job in jobs]
    started = time.perf_counter()
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    return time.perf_counter() - started


def measure_busy(report: Report, owner: Owner, methods: dict[str, Method], passes: int) -> None:
    """The owner computes in Python, against a stranger that computes: the lock and not the load."""
    burner = start_owner("burn")
    burner.send_signal(signal.SIGSTOP)
    for transport in ("shm", "tcp"):
        method = methods[transport]
        for index, shape in enumerate(SHAPES):
            ratios = []
            for _ in range(passes):
                burner.send_signal(signal.SIGCONT)
                beside = settled(method, index)
                burner.send_signal(signal.SIGSTOP)
                owner.tell("busy")
                within = settled(method, index)
                owner.tell("idle")
                ratios.append(beside / within)
            report.add(f"{transport}_owner_busy_over_other_busy_{shape.name}", ratios)
            if transport == "tcp":
                owner.tell("busy")
                over = [methods["socket"].move(index) / method.move(index) for _ in range(passes)]
                owner.tell("idle")
                report.add(f"tcp_over_socket_owner_busy_{shape.name}", over)
        owner.tell("busy")
        singles = [statistics.median(method.singles(2, 50)) * 1e6 for _ in range(passes)]
        owner.tell("idle")
        report.add(f"latency_us_{transport}_4KiB_owner_busy", singles, "us")
    burner.kill()
    burner.communicate()


def settled(method: Method, index: int) -> float:
    """Return the seconds of a move once the scheduler has spread out who computes."""
    time.sleep(0.1)
    return statistics.median(method.move(index) for _ in range(REPETITIONS))


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with nixl and mooncake")
    parser.add_argument("--quick", action="store_true", help="fewer passes")
    parser.add_argument("--output", metavar="FILE")
    options = parser.parse_args()
    passes = 3 if options.quick else 5
    report = Report(
        "transfer",
        settings={
            "moved": "64 MiB between two processes, pools of 128 MiB, random blocks on both sides",
            "passes": passes,
            "ratios": "of the same pass; over 1 is faster than the other",
        },
    )
    owner = Owner()
    shm, tcp = (Ours(name, owner.descriptor, owner.key) for name in ("shm", "tcp"))
    for name, ours in (("shm", shm), ("tcp", tcp)):
        report.add(f"gb_per_s_{name}_first_touch", [MOVED_BYTES / ours.first_touch() / 1e9], "GB/s")
    private = [empty_pool(shape) for shape in SHAPES]
    for shape, pool in zip(SHAPES, private, strict=True):
        shape.fill(pool)
    methods: dict[str, Method] = {"memcpy": Loop(private), "shm": shm}
    sources = mapped(owner.descriptor)
    methods["gather"] = Loop(sources)
    methods |= {"socket": Plain(owner.port), "tcp": tcp}
    if is_installed():
        methods["nixl_way"] = Ours("nixl", owner.descriptor, owner.key)
    if options.peers:
        methods |= {kind: Foreign(kind, options.peers) for kind in KINDS}
    try:
        measure(report, methods, passes)
        measure_at_once(report, owner, sources, passes)
        measure_busy(report, owner, methods, passes)
    finally:
        for method in methods.values():
            if isinstance(method, Foreign):
                method.close()
            elif isinstance(method, Ours):
                method.agent.close()
    owner.close()
    report.finish(options.output)


def mapped(descriptor: bytes) -> list[Any]:
    """Map the owner's pools, for the loop that reads them without us."""
    memory = msgspec.msgpack.decode(descriptor, type=PeerMemory)
    regions: list[Region] = [open_peer(region) for region in memory.regions]
    return [region.blocks for region in regions]


if __name__ == "__main__":
    main()
