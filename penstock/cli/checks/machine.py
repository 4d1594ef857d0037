"""Checks of the machine: cores, memory, limits, and what processes may do to one another here."""

import os
import platform
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from penstock.cli.checks.finding import Extent, Finding, failed, ok, warning
from penstock.cli.host import KV_BYTES_MIN, KV_SHARE
from penstock.cli.listener import Listener
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB, MIB
from penstock.runtime.folder import RunFolder
from penstock.runtime.process import ENVIRONMENT
from penstock.runtime.processes import available_bytes, usable_cores

NUM_WORKERS: Final = 2
"""Workers of `penstock serve` when nobody says."""
PORT: Final = 8000
OPEN_FILES_MIN: Final = 4096
"""A client that streams holds one; a thousand of them are not unusual."""
KV_BYTES_GOOD: Final = 512 * MIB
SHARED_MEMORY: Final = Path("/dev/shm")


def check_system(_extent: Extent) -> Iterator[Finding]:
    """Try what processes ask of Linux: descriptors of processes, private folders, local sockets."""
    release = f"{platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        yield failed("system", release, "Penstock runs on Linux: use a Linux machine or container")
        return
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        yield failed(
            "system",
            f"{release}: no descriptors of processes ({error.strerror})",
            "use Linux 5.3 or newer; in a container, a seccomp profile that allows pidfd_open",
        )
        return
    yield ok("system", f"{release}, {platform.machine()}")
    yield _folder_finding()


def check_cores(_extent: Extent) -> Iterator[Finding]:
    """Say how many cores may be used and how they are shared out."""
    cores = usable_cores()
    threads = max(1, cores // NUM_WORKERS)
    said = f"{cores} usable: {threads} compute thread(s) for each of {NUM_WORKERS} workers"
    named = [name for name in ENVIRONMENT if name.startswith("OMP") and name in os.environ]
    if cores < NUM_WORKERS:
        yield warning(
            "cores",
            f"{cores} usable: prefill and decode workers take turns on it",
            "give the container more cores, or serve with one worker: penstock serve --mixed 1",
            cores=cores,
        )
    elif named:
        yield warning(
            "cores",
            f"{said}; {', '.join(named)} in the environment is not used",
            "say --threads N to penstock serve instead",
            cores=cores,
        )
    else:
        yield ok("cores", f"{said}; while they wait, their threads sleep", cores=cores)


def check_memory(_extent: Extent) -> Iterator[Finding]:
    """Compare the free memory with the KV cache that `penstock serve` would take."""
    available = available_bytes()
    pool = int(available * KV_SHARE) // NUM_WORKERS
    said = (
        f"{available / GIB:.1f} GiB available: up to {pool / GIB:.2f} GiB of KV cache for each of "
        f"{NUM_WORKERS} workers"
    )
    figures = {"available_bytes": float(available), "kv_cache_bytes": float(pool)}
    if pool < KV_BYTES_MIN:
        yield failed("memory", said, "free memory or raise the container's limit", **figures)
    elif pool < KV_BYTES_GOOD:
        yield warning(
            "memory",
            said,
            "enough for the built-in model; for others free memory, or set --kv-cache-memory and "
            "--max-model-len",
            **figures,
        )
    else:
        yield ok("memory", said, **figures)
    yield _shm_finding()


def check_limits(_extent: Extent) -> Iterator[Finding]:
    """Look at the limits of this process that others have run into."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_MIN:
        yield warning(
            "open files",
            f"at most {soft}: about as many clients at once",
            "ulimit -n 65536" if hard < 0 or hard >= 65536 else f"raise the hard limit of {hard}",
        )
    else:
        yield ok("open files", "no limit" if soft < 0 else f"at most {soft}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    said = "no limit" if locked < 0 else f"at most {locked / MIB:.0f} MiB"
    yield ok("locked memory", f"{said}; only RDMA (NIXL) asks for it")


def check_port(_extent: Extent) -> Iterator[Finding]:
    """Try the port that `penstock serve` listens at when nobody says."""
    try:
        Listener.tcp("127.0.0.1", PORT).close()
    except StartupFailed as error:
        yield warning("port", str(error), "or end what listens there")
    else:
        yield ok("port", f"{PORT} on loopback is free")


def _folder_finding() -> Finding:
    """Make a private folder with a socket in it, as a cluster does."""
    try:
        folder = RunFolder.create()
    except OSError as error:
        return failed(
            "private folder", f"cannot be made: {error}", "set TMPDIR to a folder you can write to"
        )
    try:
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(folder.path / f"decode-10.{(1 << 63) - 1}.sock"))
    except OSError as error:
        return failed(
            "private folder",
            f"no socket can be made in {folder.path.parent}: {error}",
            "set XDG_RUNTIME_DIR or TMPDIR to a short path on a local disk",
        )
    finally:
        folder.remove()
    return ok("private folder", f"sockets in {folder.path.parent}")


def _shm_finding() -> Finding:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ok("/dev/shm", "none; KV pools need none, they are anonymous")
    size = status.f_frsize * status.f_blocks
    said = f"{size / MIB:.0f} MiB; KV pools do not use it, they are anonymous"
    if size < 64 * MIB:
        return warning(
            "/dev/shm", said, "other libraries (NIXL's UCX) use it: docker run --shm-size 1g"
        )
    return ok("/dev/shm", said, shm_bytes=float(size))
