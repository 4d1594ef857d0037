"""How fast a tier gives bytes back on this machine, measured in some ten milliseconds.

Only asked where something depends on it: a codec that is to be chosen. A worker learns its tiers'
real rates from the moves that it makes.
"""

import mmap
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np

from penstock.core.types import MIB, NS_PER_S
from penstock.kv.tiers import Tier
from penstock.runtime.settings import TierSettings
from penstock.transport.cxl import BYTES_PER_S as CXL_BYTES_PER_S

SAMPLE_BYTES: Final = 16 * MIB
_RUNS: Final = 5


def tier_bytes_per_s(tier: TierSettings) -> int:
    """Return a tier's rate, reading. Raises: `OSError` when a disk cannot be written."""
    if tier.name == Tier.DISK.value:
        return disk_bytes_per_s(Path(tier.path).expanduser())
    copied = memory_bytes_per_s()
    # An expander is what `transport/cxl.py` says it is, and no faster than copying.
    return min(copied, CXL_BYTES_PER_S) if tier.name == Tier.CXL.value else copied


def memory_bytes_per_s() -> int:
    """Return what one thread copies."""
    source = np.ones(SAMPLE_BYTES, np.uint8)
    landed = np.zeros_like(source)
    return _rate(lambda: np.copyto(landed, source))


def disk_bytes_per_s(folder: Path) -> int:
    """Return what one thread reads of a file there, past the page cache where that can be.

    Leaves nothing behind. Raises: `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(folder, flags | os.O_DIRECT, 0o600)
    except OSError:  # tmpfs and others have no way past the cache, and some no nameless files
        fd = os.open(folder, flags, 0o600)
    try:
        # Mapped, so that it begins at a page.
        with closing(mmap.mmap(-1, SAMPLE_BYTES)) as memory:
            memory.write(os.urandom(MIB) * (SAMPLE_BYTES // MIB))
            if os.pwrite(fd, memory, 0) != SAMPLE_BYTES:
                raise OSError(f"{folder}: a file of {SAMPLE_BYTES} bytes could not be written")
            os.fsync(fd)
            return _rate(lambda: os.preadv(fd, [memory], 0))
    finally:
        os.close(fd)


def _rate(copy: Callable[[], object]) -> int:
    took_ns = []
    for _ in range(_RUNS):
        started_ns = time.monotonic_ns()
        copy()
        took_ns.append(time.monotonic_ns() - started_ns)
    return max(1, SAMPLE_BYTES * NS_PER_S // max(1, sorted(took_ns)[_RUNS // 2]))
