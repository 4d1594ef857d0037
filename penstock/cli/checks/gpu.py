"""Checks of GPUs: the driver, devices, the compiler of kernels, and memory between two processes.

Without a GPU this is one line that says what is missing. With one, another process (`gpu_peer.py`)
fills memory of it, which is mapped by CUDA IPC, copied, compared byte by byte, and measured beside
a copy within this process: the most that the device does. Torch's own view is `engine.py`'s.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from penstock.cli.checks.finding import Extent, Finding, failed, ok, warning
from penstock.cli.checks.gpu_peer import BLOCK_BYTES, across, allocate, contents, pinned
from penstock.cli.checks.process import running
from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import BackendUnavailable, PenstockError
from penstock.core.types import GIB
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory
from penstock.transport.cuda_driver import LIBRARY, Copy, CudaDriver
from penstock.transport.cuda_ipc import CudaIpc, CudaRegion

NVIDIA: Final = Path("/dev/nvidia0")
TRITON_MIN: Final = 3, 4
SHARE_MIN: Final = 0.7


def check_gpu(extent: Extent, library: str = LIBRARY) -> Iterator[Finding]:
    """Look at the driver and its devices, and move memory between two processes on each."""
    try:
        driver = CudaDriver(library)
    except BackendUnavailable as error:
        reason = str(error).partition(" (")[0]
        if NVIDIA.exists():
            yield warning("gpu", f"there is one, but not for us: {reason}", str(error))
        else:
            yield ok("gpu", f"none, so workers compute on the CPU: {reason}")
        return
    devices = driver.devices()
    for number, (name, total_bytes) in enumerate(devices):
        yield ok(
            f"gpu {number}", f"{name}, {total_bytes / GIB:.0f} GiB", total_bytes=float(total_bytes)
        )
    yield _triton_finding()
    for number in range(len(devices)):
        yield from _ipc_findings(extent, library, driver, number)


def _triton_finding() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return warning("triton", "not installed: --device cuda has no kernels", _TRITON)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return warning("triton", "set to interpret kernels", "unset TRITON_INTERPRET")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < TRITON_MIN:
        return warning("triton", f"{version} is too old", _TRITON)
    return ok("triton", f"{version} compiles the kernels, each on first use")


def _ipc_findings(
    extent: Extent, library: str, driver: CudaDriver, device: int
) -> Iterator[Finding]:
    name, num_blocks = f"cuda_ipc on {device}", max(2, extent.moved_bytes // BLOCK_BYTES)
    try:
        with _owner(library, device, num_blocks) as memory, closing(CudaIpc(driver, device)) as way:
            into = allocate(driver, device, num_blocks)
            started = time.perf_counter()
            source = way.open(memory, 0)
            opening_s = time.perf_counter() - started
            # The last block first: as many spans as blocks.
            backwards = cut(np.arange(num_blocks)[::-1], np.arange(num_blocks))
            source.pull(into, backwards)
            if not _is_right(driver, into):
                yield failed(name, "memory of another process was read wrongly", _TELL_US)
                return
            said = f"another process's memory mapped in {opening_s * 1e3:.1f} ms, read and verified"
            yield ok(name, said, opening_s=opening_s)
            whole = cut(np.arange(num_blocks), np.arange(num_blocks))
            beside = allocate(driver, device, num_blocks)
            own = way.own(beside)
            yield _rate_finding(
                name,
                num_blocks * BLOCK_BYTES,
                _best(lambda: source.pull(into, whole), extent.repetitions),
                _best(lambda: own.pull(into, whole), extent.repetitions),
            )
    except (OSError, PenstockError) as error:
        said = f"two processes cannot share the memory of this GPU: {error}"
        yield failed(name, said, "start prefill and decode in one container, and one PID namespace")


def _rate_finding(name: str, num_bytes: int, pull_s: float, copy_s: float) -> Finding:
    rate, share = num_bytes / pull_s, copy_s / pull_s
    said = (
        f"{rate / 1e9:.1f} GB/s for {num_bytes >> 20} MiB, {share:.2f} of a copy within a process"
    )
    figures = {"bytes_per_s": rate, "share": share}
    if share < SHARE_MIN:
        return warning(f"{name}, rate", said, "is the GPU busy? Look at nvidia-smi", **figures)
    return ok(f"{name}, rate", said, **figures)


def _is_right(driver: CudaDriver, region: CudaRegion) -> bool:
    here = pinned(driver, region.device, region.num_blocks)
    try:
        copy = Copy(here.ctypes.data, region.address, here.nbytes)
        across(driver, region.device, [copy])
        return np.array_equal(here, contents(region.num_blocks)[::-1])
    finally:
        driver.unpin(region.device, here.ctypes.data)


def _best(move: Callable[[], object], times: int) -> float:
    """Return the fewest seconds: what is asked is what the device can do."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


@contextmanager
def _owner(library: str, device: int, num_blocks: int) -> Iterator[PeerMemory]:
    """Start the other process; what it says of its memory. Raises: `StartupFailed`."""
    module = "penstock.cli.checks.gpu_peer"
    with running(module, library, device, num_blocks) as first_line:
        region = msgspec.json.decode(first_line(), type=RegionDescriptor)
        yield PeerMemory("the other process", 1, (region,))


_TRITON: Final = "pip install 'penstock[cuda]'"
_TELL_US: Final = "test this GPU's memory; otherwise this is a bug in Penstock: tell us"
