"""`python -m` this: the other process of the check of GPUs, whose memory is mapped and read.

    python -m penstock.cli.checks.gpu_peer LIBRARY DEVICE NUM_BLOCKS

Fills blocks on a device, prints a line that describes them, and stays until its input ends. A
process of its own and without torch: a driver that takes it down is something to report.
"""

import mmap
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.core.errors import DeadlineExceeded
from penstock.core.types import MIB
from penstock.transport.cuda_driver import Copy, CudaDriver, Driver
from penstock.transport.cuda_ipc import NAP_S, CudaRegion, describe

BLOCK_BYTES: Final = MIB // 4
DEADLINE_S: Final = 10.0

Bytes2D = npt.NDArray[np.uint8]


def main() -> None:
    """Be the owner."""
    library, (device, num_blocks) = sys.argv[1], map(int, sys.argv[2:])
    driver = CudaDriver(library)
    region = allocate(driver, device, num_blocks)
    here = pinned(driver, device, num_blocks)
    here[:] = contents(num_blocks)
    across(driver, device, [Copy(region.address, here.ctypes.data, here.nbytes)])
    print(msgspec.json.encode(describe(driver, region, os.getpid())).decode(), flush=True)
    sys.stdin.read()


def allocate(driver: CudaDriver, device: int, num_blocks: int) -> CudaRegion:
    """Return blocks on a device. Raises: `BackendUnavailable`."""
    address = driver.allocate(device, num_blocks * BLOCK_BYTES)
    return CudaRegion(device, address, num_blocks, BLOCK_BYTES)


def pinned(driver: Driver, device: int, num_blocks: int) -> Bytes2D:
    """Return as many blocks of the host, which the device copies. Raises: `BackendUnavailable`."""
    memory = mmap.mmap(-1, num_blocks * BLOCK_BYTES)
    here = np.frombuffer(memory, np.uint8).reshape(num_blocks, BLOCK_BYTES)
    driver.pin(device, here.ctypes.data, here.nbytes)
    return here


def across(driver: Driver, device: int, copies: Sequence[Copy]) -> None:
    """Copy and wait for it. Raises: `PeerLost`, `DeadlineExceeded`."""
    driver.copy(device, copies)
    ends_at = time.monotonic() + DEADLINE_S
    while not driver.is_done(device):
        if time.monotonic() > ends_at:
            raise DeadlineExceeded(f"GPU {device} has copied for {DEADLINE_S:.0f} s without an end")
        time.sleep(NAP_S)


def contents(num_blocks: int) -> Bytes2D:
    """Return what the blocks have, the same in every process: no two rows are alike."""
    row = np.arange(BLOCK_BYTES, dtype=np.uint32)
    block = np.arange(num_blocks, dtype=np.uint32)[:, None]
    return ((row * 2654435761 >> 13) + block * 40503).astype(np.uint8)


if __name__ == "__main__":
    main()
