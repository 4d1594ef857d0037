"""What a process of the cluster asks of Linux: to die with its parent, to be named, to be waited
for.

Knows no cluster. Used by the front, the host and the workers.
"""

import ctypes
import os
import signal
from pathlib import Path

from penstock.core.types import KIB

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_CGROUP = Path("/sys/fs/cgroup")


def die_with_parent(signal_number: signal.Signals, parent_pid: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    Delivers it at once when the parent is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)


def name_process(name: str) -> None:
    """Show `name` (its first 15 characters) in ps, top and core dumps."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def describe_code(code: int) -> str:
    """Say how a process ended, from its exit code; a signal is its negative."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return "killed by SIGKILL: by somebody, or by the system for want of memory"
    return f"killed by {name}"


def usable_cores() -> int:
    """Return how many cores this process may use, a container's quota included."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_bytes() -> int:
    """Return how much memory may still be used, a container's limit included."""
    lines = dict(line.split(":") for line in _read(Path("/proc/meminfo")).splitlines())
    available = int(lines["MemAvailable"].removesuffix("kB")) * KIB
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        # The page cache counts as used, but goes when memory is needed.
        stat = dict(line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
        free = int(limit) - int(used) + int(stat.get("inactive_file", "0"))
        available = min(available, max(0, free))
    return available


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
