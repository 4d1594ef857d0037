"""Checks of the hand-off, between two real processes: every transport tried and measured.

Starts `peer.py`, or calls one on another host, reads its memory in each way there is, compares
every byte, and puts each rate beside what is possible at most: a copy in one process for shared
memory, a plain socket for TCP.
"""

import os
import secrets
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec.structs import replace

from penstock.cli.checks.finding import Extent, Finding, failed, ok, warning
from penstock.cli.checks.peer import (
    NUM_SMALL,
    SMALL_BYTES,
    fill,
    host_id,
    name_of_a_block,
)
from penstock.cli.checks.process import running
from penstock.cli.checks.rates import Plain, measure
from penstock.core.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    PeerLost,
    StartupFailed,
)
from penstock.core.types import BlockId
from penstock.core.version import VERSION
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory
from penstock.transport.key import VARIABLE, cluster_key
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import has_rdma, is_installed
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.way import Source, Way

SKEW_NS_MAX: Final = 1_000_000
DAY_SKEW_NS_MAX: Final = 500_000_000
Explain = Callable[[str, dict[str, Any]], Finding]
_NEXT_TO_SHM: Final = (
    "meanwhile: penstock serve --transport tcp. Workers must run as one user in one PID namespace"
)


def check_handoff(extent: Extent) -> Iterator[Finding]:
    """Read the memory of another process of this host by each transport, compare, and measure."""
    key = secrets.token_bytes(32)
    try:
        with _peer(extent, key) as port, Plain("127.0.0.1", port, key) as plain:
            yield from _try_everything(extent, plain, key, "127.0.0.1")
    except (OSError, PeerLost, DeadlineExceeded, StartupFailed) as error:
        yield failed(
            "second process",
            f"nothing can be moved between two processes: {error}",
            "look at the limits on processes and memory (ulimit -a, the container's)",
        )


def check_peer(extent: Extent, host: str, port: int) -> Iterator[Finding]:
    """Do the same with a `penstock doctor --listen` that runs at this address."""
    key = cluster_key()
    try:
        with Plain(host, port, key) as plain:
            yield from _try_everything(extent, plain, key, host)
    except OSError as error:
        yield failed(
            "peer",
            f"{host}:{port} cannot be reached: {error}",
            f"run `penstock doctor --listen HOST:{port}` there, and open the firewall",
        )
    except (PeerLost, DeadlineExceeded) as error:
        yield failed(
            "peer",
            f"{host}:{port}: {error}",
            f"give both sides one cluster key: the file, or {VARIABLE}",
        )


def _try_everything(extent: Extent, plain: Plain, key: bytes, host: str) -> Iterator[Finding]:
    facts = plain.facts()
    memory = _as_seen_from_here(
        msgspec.msgpack.decode(b64decode(facts["descriptor"]), type=PeerMemory), host
    )
    yield _version_finding(facts)
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
        yield _clock_finding(plain, facts)
        yield from measure(extent, plain, sources, facts["moved_bytes"])


def _as_seen_from_here(memory: PeerMemory, host: str) -> PeerMemory:
    """Put the host that was called where the peer listens at every address of its own."""
    shown = f"[{host}]" if ":" in host else host
    endpoints = [
        replace(e, address=f"{shown}:{e.address.rpartition(':')[2]}")
        if e.address.rpartition(":")[0] in ("0.0.0.0", "[::]")
        else e
        for e in memory.endpoints
    ]
    return replace(memory, endpoints=tuple(endpoints))


@contextmanager
def _peer(extent: Extent, key: bytes) -> Iterator[int]:
    """Start the other process; the port at which it listens, within a deadline.

    Raises: `StartupFailed` with its last words.
    """
    # Another seed of Python's own hash: what two processes call a block must not depend on it.
    module, seed, words = "penstock.cli.checks.peer", "12345", key.hex().encode() + b"\n"
    with running(module, extent.moved_bytes, words=words, PYTHONHASHSEED=seed) as first_line:
        yield int(first_line())


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


def _version_finding(facts: dict[str, Any]) -> Finding:
    """Compare what must be the same on both sides."""
    if facts["version"] != VERSION:
        said = f"{facts['version']} there, {VERSION} here"
        return failed("version", said, "install the same version of Penstock on both sides")
    if facts["name"] != name_of_a_block():
        return failed("version", "the same block has two names", "install both sides again")
    return ok("version", f"{VERSION} on both sides; names of blocks agree, whatever PYTHONHASHSEED")


def _clock_finding(plain: Plain, facts: dict[str, Any]) -> Finding:
    is_one_host = _is_one_host(facts)
    skew_ns, round_trip_ns = plain.skew_ns(is_one_host=is_one_host)
    said = f"{skew_ns / 1000:+,.0f} µs apart, known to {round_trip_ns / 1000:,.0f}"
    allowed_ns = SKEW_NS_MAX if is_one_host else DAY_SKEW_NS_MAX
    if abs(skew_ns) > max(allowed_ns, round_trip_ns):
        advice = "keep both by NTP: their logs cannot be laid side by side"
        if is_one_host:
            advice = "run all workers in one time namespace, or ledgers of requests will be wrong"
        return warning("clock", said, advice, clock_skew_s=skew_ns / 1e9)
    return ok("clock", said, clock_skew_s=skew_ns / 1e9)


def _is_one_host(facts: dict[str, Any]) -> bool:
    return bool(facts["host"] == host_id())


# ------------------------------------------------------------------------------- what is not there


def _no_shared_memory(why: str, facts: dict[str, Any]) -> Finding:
    """Say why a peer's memory cannot be mapped, as far as the system tells."""
    if not _is_one_host(facts):
        return ok("shm", "not possible: the peer is on another host")
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
    return warning("tcp", f"a peer's memory cannot be reached: {why}", _FIREWALL)


_TELL_US: Final = "test this machine's memory; otherwise this is a bug in Penstock: tell us"
_FIREWALL: Final = (
    "let processes connect to each other's ports (firewall, network namespace), on this machine "
    "at 127.0.0.1"
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


_NIXL_INSTALL: Final = "pip install 'penstock[nixl]'"
_NIXL_ADVICE: Final = "look at ucx_info -d and UCX_TLS; until then TCP is used between hosts"
