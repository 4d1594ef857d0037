"""Memory of a GPU that another process can map, and the driver that copies it.

Where only the way is walked, both are the tests' double of the driver's library, whose device
memory is the host's.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import CudaRegion, cuda_region

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = 0


@cache
def double_library() -> str:
    """Compile the double once in this process; return where it is."""
    from tests.transport.cuda_double import build_double

    return str(build_double(Path(tempfile.mkdtemp(prefix="penstock-double-"))))


def make_driver(library: str) -> CudaDriver:
    """Return a driver: the real one, or where a library is named that one."""
    return CudaDriver(library) if library else CudaDriver()


def allocate(library: str, num_blocks: int, block_bytes: int) -> tuple[CudaRegion, Tensor]:
    """Return blocks on the device, as a region and as a tensor of bytes."""
    if not library:
        blocks = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=f"cuda:{DEVICE}")
        return cuda_region(blocks), blocks
    from tests.transport import cuda_double

    (region,) = cuda_double.allocate(library, DEVICE, [(num_blocks, block_bytes)])
    return region, torch.from_numpy(cuda_double.memory(region))


def as_fragments(region: CudaRegion, fragment_bytes: int) -> CudaRegion:
    """Return the same memory in smaller blocks."""
    assert region.block_bytes % fragment_bytes == 0, (region, fragment_bytes)
    count = region.capacity_bytes // fragment_bytes
    return CudaRegion(region.device, region.address, count, fragment_bytes)
