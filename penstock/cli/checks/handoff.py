"""Checks of the hand-off, between two real processes: every transport tried and measured.

Starts `peer.py`, reads its memory in each way there is, compares every byte, and puts each rate
beside what this machine can do at most: a copy in one process for shared memory, a plain loopback
socket for TCP.
"""

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np

from penstock.cli.checks.finding import Extent, Finding, failed, ok, warning
from penstock.cli.checks.peer import NUM_SMALL, SMALL_BYTES, fill, name_of_a_block
from penstock.cli.checks.rates import Plain, measure
from penstock.core.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    PeerLost,
    StartupFailed,
)
from penstock.core.types import BlockId
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import has_rdma, is_installed
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.way import Source, Way

PEER_DEADLINE_S: Final = 30.0
SKEW_NS_MAX: Final = 1_000_000
Explain = Callable[[str, dict[str, Any]], Finding]
_NEXT_TO_SHM: Final = (
    "meanwhile: penstock serve --transport tcp. Workers must run as one user in one PID namespace"
)


def check_handoff(extent: Extent) -> Iterator[Finding]:
    """Read a peer's memory by each transport, compare, and measure."""
    key = secrets.token_bytes(32)
    try:
        with _peer(extent, key) as facts:
            yield from _try_everything(extent, facts, key)
    except (OSError, PeerLost, DeadlineExceeded, StartupFailed) as error:
        yield failed(
            "second process",
            f"nothing can be moved between two processes: {error}",
            "look at the limits on processes and memory (ulimit -a, the container's)",
        )


def _try_everything(extent: Extent, facts: dict[str, Any], key: bytes) -> Iterator[Finding]:
    memory = msgspec.msgpack.decode(b64decode(facts["descriptor"]), type=PeerMemory)
    yield _names_finding(facts)
    sources: dict[str, tuple[Source, Source]] = {}
    with ExitStack() as stack:
        ways: list[tuple[Way, Explain]] = [(SharedMemory(), _no_shared_memory), (Tcp(key), _no_tcp)]
        nixl = _start_nixl()
        if isinstance(nixl, Nixl):
            ways.append((nixl, _no_nixl))
        for way, explain in ways:
            stack.enter_context(closing(way))
            started = time.perf_counter()
            opened = _open(way, memory)
            seconds = time.perf_counter() - started
            if isinstance(opened, str):
                yield explain(opened, facts)
            else:
                sources[way.kind] = opened
                yield _read_finding(way, opened, seconds)
        yield _stranger_finding(memory)
        if isinstance(nixl, Finding):
            yield nixl
        yield _cuda_finding()
        with Plain(facts["port"]) as plain:
            yield _clock_finding(plain)
            yield from measure(extent, plain, sources)


@contextmanager
def _peer(extent: Extent, key: bytes) -> Iterator[dict[str, Any]]:
    """Start the other process; what it says of itself, within a deadline.

    Raises: `StartupFailed` with its last words.
    """
    source = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    # Another seed of Python's own hash: what two processes call a block must not depend on it.
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-P", "-m", "penstock.cli.checks.peer", str(extent.moved_bytes)]
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=environment,
        )
        try:
            assert process.stdin is not None
            process.stdin.write(key.hex().encode() + b"\n")
            process.stdin.flush()
            yield json.loads(_first_line(process, words))
        finally:
            process.kill()
            process.communicate()


def _first_line(process: "subprocess.Popen[bytes]", words: IO[bytes]) -> bytes:
    assert process.stdout is not None
    deadline, line = time.monotonic() + PEER_DEADLINE_S, b""
    while not line.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        is_there, _, _ = select.select([process.stdout], [], [], left)
        chunk = os.read(process.stdout.fileno(), 65536) if is_there else b""
        if not chunk:
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()
            raise StartupFailed(said[-1] if said else f"nothing within {PEER_DEADLINE_S:.0f} s")
        line += chunk
    return line


def _open(way: Way, memory: PeerMemory) -> tuple[Source, Source] | str:
    try:
        return way.open(memory, 0), way.open(memory, 1)
    except (PeerLost, DeadlineExceeded) as error:
        return str(error)


# -------------------------------------------------------------------------------- what is compared


def _read_finding(way: Way, sources: tuple[Source, Source], opening_s: float) -> Finding:
    """Pull a few scattered blocks and compare them, by bytes and by digests."""
    pool = SharedPool(NUM_SMALL, SMALL_BYTES)
    try:
        numbers = np.arange(NUM_SMALL - 1, -1, -2)
        sources[1].pull(pool.region, cut(numbers, np.arange(len(numbers))))
        expected = np.empty((NUM_SMALL, SMALL_BYTES), np.uint8)
        fill(expected)
        landed = [BlockId(i) for i in range(len(numbers))]
        theirs = take_digests(expected, [BlockId(i) for i in numbers.tolist()])
        is_right = np.array_equal(pool.region.blocks[: len(numbers)], expected[numbers])
        is_right &= take_digests(pool.region.blocks, landed) == theirs
    except (PeerLost, DeadlineExceeded) as error:
        return failed(way.kind, f"reading a peer's memory failed: {error}", _TELL_US)
    finally:
        pool.close()
    if not is_right:
        return failed(way.kind, "a peer's memory was read wrongly", _TELL_US)
    said = f"another process's memory read and verified, opened in {opening_s * 1e3:.1f} ms"
    return ok(way.kind, f"{said} ({sources[1].name})", opening_s=opening_s)


def _stranger_finding(memory: PeerMemory) -> Finding:
    """Knock with a wrong key: it must not be let in."""
    stranger = Tcp(secrets.token_bytes(32))
    try:
        stranger.open(memory, 0)
    except PeerLost as refusal:
        return ok("authentication", f"a process with another key is refused: {refusal}")
    except DeadlineExceeded as error:
        return warning("authentication", f"could not be tried: {error}", _FIREWALL)
    finally:
        stranger.close()
    return failed("authentication", "a wrong key was let in", _TELL_US)


def _names_finding(facts: dict[str, Any]) -> Finding:
    if facts["name"] == name_of_a_block():
        return ok("names of blocks", "the same in both processes, whatever PYTHONHASHSEED is")
    return failed("names of blocks", "differ between processes", "install the same version in both")


def _clock_finding(plain: Plain) -> Finding:
    skew_ns, round_trip_ns = plain.skew_ns()
    said = f"{skew_ns / 1000:+.0f} µs between the processes, known to {round_trip_ns / 1000:.0f}"
    if abs(skew_ns) > max(SKEW_NS_MAX, round_trip_ns):
        return warning(
            "clock",
            said,
            "the parts of a request's ledger will be wrong: run all workers in one time namespace",
            clock_skew_s=skew_ns / 1e9,
        )
    return ok("clock", said, clock_skew_s=skew_ns / 1e9)


# ------------------------------------------------------------------------------- what is not there


def _no_shared_memory(why: str, facts: dict[str, Any]) -> Finding:
    """Say why a peer's memory cannot be mapped, as far as the system tells."""
    hints = []
    with_status = Path(f"/proc/{facts['pid']}/status")
    try:
        lines = dict(line.split(":", 1) for line in with_status.read_text().splitlines())
        owners = lines["Uid"].split()
        if owners[1] != str(os.geteuid()):
            hints.append(f"the peer belongs to user {owners[1]}")
    except (OSError, KeyError, ValueError):
        hints.append("/proc does not show the peer (hidepid, or another PID namespace)")
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "3":
        hints.append("kernel.yama.ptrace_scope is 3")
    hint = f" ({'; '.join(hints)})" if hints else ""
    return failed("shm", f"a peer's pool cannot be mapped: {why}{hint}", _NEXT_TO_SHM)


def _no_tcp(why: str, _facts: dict[str, Any]) -> Finding:
    return warning("tcp", f"a peer cannot be reached over loopback: {why}", _FIREWALL)


_TELL_US: Final = "test this machine's memory; otherwise this is a bug in Penstock: tell us"
_FIREWALL: Final = (
    "let processes of this machine connect to 127.0.0.1 (firewall, network namespace)"
)


def _no_nixl(why: str, _facts: dict[str, Any]) -> Finding:
    return warning("nixl", f"installed, but a peer cannot be read: {why}", _NIXL_ADVICE)


def _start_nixl() -> Nixl | Finding:
    """Start NIXL, or say what is missing; it is worth having for RDMA alone."""
    if not is_installed():
        if has_rdma():
            return warning("nixl", "there is RDMA, and NIXL is not installed", _NIXL_INSTALL)
        return ok("nixl", "not installed, and there is no RDMA that it could use")
    try:
        return Nixl()
    except BackendUnavailable as error:
        return warning("nixl", f"installed, but it does not start: {error}", _NIXL_ADVICE)


def _cuda_finding() -> Finding:
    if not _NVIDIA.exists():
        return ok("cuda_ipc", "there is no NVIDIA GPU")
    try:
        CudaDriver()
    except BackendUnavailable as error:
        return warning("cuda_ipc", "there is a GPU, but its driver cannot be used", str(error))
    return ok("cuda_ipc", "the driver can share memory of GPUs; only the library uses it yet")


_NVIDIA: Final = Path("/dev/nvidia0")
_NIXL_INSTALL: Final = "pip install 'penstock[nixl]'"
_NIXL_ADVICE: Final = "look at ucx_info -d and UCX_TLS; until then TCP is used between hosts"
