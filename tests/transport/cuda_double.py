"""A double of the driver's library for tests: compiled, and memory of its devices."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from penstock.transport.cuda_ipc import CudaRegion

SOURCE = Path(__file__).parent / "double" / "cuda.cpp"


def build_double(folder: Path) -> Path:
    """Compile the double, against cuda.h where the toolkit is installed."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    nvcc = Path(shutil.which("nvcc") or "bin/nvcc").resolve()
    homes = [Path(os.environ.get("CUDA_HOME", "none")), nvcc.parents[1], nvcc.parents[1] / "cuda"]
    target = folder / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    headers = [f"-isystem{home / 'include'}" for home in homes if (home / "include").is_dir()]
    subprocess.run([compiler, *flags, *headers, str(SOURCE), "-o", str(target)], check=True)
    return target


def allocate(library: str, device: int, sizes: list[tuple[int, int]]) -> list[CudaRegion]:
    """Allocate device memory once, and cut regions out of it as torch's allocator does.

    `sizes` are blocks and bytes of each.
    """
    cuda = ctypes.CDLL(library)
    context, address, number = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
    total = sum(num_blocks * block_bytes for num_blocks, block_bytes in sizes)
    assert cuda.cuDeviceGet(ctypes.byref(number), device) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number) == 0
    assert cuda.cuCtxPushCurrent_v2(context) == 0
    assert cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(total)) == 0
    assert cuda.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    regions, start = [], address.value
    for num_blocks, block_bytes in sizes:
        regions.append(CudaRegion(device, start, num_blocks, block_bytes))
        start += num_blocks * block_bytes
    return regions


def memory(region: CudaRegion) -> np.ndarray:
    """View the double's device memory, which is the host's: [num_blocks, block_bytes] uint8."""
    raw = (ctypes.c_uint8 * region.capacity_bytes).from_address(region.address)
    return np.frombuffer(raw, np.uint8).reshape(region.num_blocks, region.block_bytes)
