"""Own the check that a test leaves no process and no shared-memory segment behind.

Several runs may share a machine, so only descendants of this run count, and a segment that a
process outside it has mapped is not ours to judge. Called by the fixtures in `conftest.py`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

SHARED_MEMORY = Path("/dev/shm")

# A worker whose parent died is nobody's child any more, but it keeps the environment of this run.
RUN_MARK = "PENSTOCK_TEST_RUN"
RUN_ID = f"{os.getpid()}-{time.time_ns()}"


def mark_descendants() -> None:
    """Put this run's mark into the environment that every process started from now on inherits.

    multiprocessing's resource tracker is started right away: in the middle of a test it would be a
    process that has not said yet what it is.
    """
    os.environ[RUN_MARK] = RUN_ID
    resource_tracker.ensure_running()


@contextmanager
def leak_check(grace_s: float = 30.0) -> Iterator[None]:
    """Fail the test if the body leaves a process or a segment that does not go within `grace_s`.

    It waits no longer than it must; on a machine that is loaded several times over, a process with
    torch in it takes more than five seconds to end.
    Processes left behind are killed, so that the next test starts clean.
    """
    processes_before, segments_before = set(live_descendants()), _segments()
    yield
    deadline = time.monotonic() + grace_s
    while True:
        processes = [p for p in live_descendants() if p not in processes_before]
        segments = _segments() - segments_before
        if segments:
            segments -= _segments_of_strangers()
        if not processes and not segments:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    described = [_describe_and_kill(process) for process in processes]
    message = f"left behind: processes {described}, shared memory {sorted(segments)}"
    pytest.fail(message, pytrace=False)


def _describe_and_kill(process: psutil.Process) -> str:
    description = str(process.pid)
    with suppress(psutil.NoSuchProcess):
        description += " " + " ".join(process.cmdline())[:200]
        process.kill()
    return description


def live_descendants() -> list[psutil.Process]:
    """List the live processes that this run has started, orphans included.

    Left out is multiprocessing's own resource tracker, which is meant to stay until the end.
    """
    children = set(psutil.Process().children(recursive=True))
    alive = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            is_ours = process in children or process.environ().get(RUN_MARK) == RUN_ID
            if is_ours and "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                alive.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive


def _segments() -> set[str]:
    # Any program that loads LLVM's OpenMP keeps a mark there, and keeps it unmapped.
    names = {entry.name for entry in SHARED_MEMORY.iterdir()}
    return {name for name in names if not name.startswith("__KMP_REGISTERED_LIB_")}


def _segments_of_strangers() -> set[str]:
    """Name segments that a process outside this test run has mapped: not ours to judge."""
    ours = {os.getpid(), *(process.pid for process in live_descendants())}
    found = set()
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            _, separator, name = line.partition(f"{SHARED_MEMORY}/")
            if separator:
                found.add(name.removesuffix(" (deleted)"))
    return found
