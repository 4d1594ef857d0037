"""The CXL tier: memory of a NUMA node without cores, as a CXL expander shows itself to Linux.

Where a machine has none, the same slots in ordinary memory at the rate and latency of an expander,
and everything that names the tier says *emulated*. The rate is kept by waiting for what is left of
a copy's time; the copy itself is real. `cli/tiers.py` opens it.

Source: CXL 2.0 x8 expanders, measured at 20 to 26 GB/s and about 250 ns; Sun et al., Demystifying
CXL Memory with Genuine CXL-Ready Systems and Devices, MICRO 2023.
"""

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from penstock.core.errors import StartupFailed
from penstock.core.types import NS_PER_S, BlockHash, Digest
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Region
from penstock.transport.tier import MemoryTier

NODES: Final = Path("/sys/devices/system/node")
BYTES_PER_S: Final = 20_000_000_000
LATENCY_NS: Final = 250
EMULATED: Final = "cxl (emulated)"
MPOL_BIND: Final = 2
MBIND: Final = {"x86_64": 237, "aarch64": 235}
"""The number of the system call, by machine: libc has no name for it."""


def open_cxl(num_slots: int, block_bytes: int) -> MemoryTier:
    """Return slots on a memory-only NUMA node, or an emulated tier where there is none.

    Raises: `StartupFailed` when the system does not give the memory.
    """
    node = find_node()
    if node is None:
        return EmulatedTier(num_slots, block_bytes)
    return NodeTier(num_slots, block_bytes, node)


def cxl_kind() -> str:
    """Return what the tier is on this machine."""
    node = find_node()
    return EMULATED if node is None else f"cxl (node {node})"


def find_node(nodes: Path = NODES) -> int | None:
    """Return the first NUMA node that has memory and no core."""
    try:
        with_memory = parse_nodes((nodes / "has_memory").read_text())
        with_cores = parse_nodes((nodes / "has_cpu").read_text())
    except (OSError, ValueError):
        return None
    return min(with_memory - with_cores, default=None)


def parse_nodes(text: str) -> set[int]:
    """Return the numbers of a kernel list such as `0-2,5`. Raises: `ValueError`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


class NodeTier(MemoryTier):
    """Slots whose pages are on one NUMA node. Raises: `StartupFailed` when they cannot be."""

    def __init__(self, num_slots: int, block_bytes: int, node: int) -> None:
        super().__init__(num_slots, block_bytes)
        self.kind = f"cxl (node {node})"
        number = MBIND.get(os.uname().machine)
        mask = (ctypes.c_ulong * (node // 64 + 1))()
        mask[node // 64] = 1 << node % 64
        libc = ctypes.CDLL(None, use_errno=True)
        wrong = number is None or libc.syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(self.region.address),
            ctypes.c_ulong(self.region.capacity_bytes),
            ctypes.c_int(MPOL_BIND),
            mask,
            ctypes.c_ulong(64 * len(mask) + 1),
            ctypes.c_uint(0),
        )
        if wrong:
            reason = os.strerror(ctypes.get_errno()) if number else "unknown machine"
            raise StartupFailed(f"--kv-tier cxl: no memory on NUMA node {node}: {reason}")


class EmulatedTier(MemoryTier):
    """Slots in ordinary memory that are not faster than an expander's."""

    def __init__(
        self,
        num_slots: int,
        block_bytes: int,
        *,
        bytes_per_s: int = BYTES_PER_S,
        latency_ns: int = LATENCY_NS,
    ) -> None:
        super().__init__(num_slots, block_bytes)
        self.kind = EMULATED
        self._bytes_per_s = bytes_per_s
        self._latency_ns = latency_ns

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        """Copy blocks into slots, in no less than an expander's time."""
        started_ns = time.monotonic_ns()
        super().write(source, spans, names, digests)
        self.pace(spans, started_ns)

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks, in no less than an expander's time."""
        started_ns = time.monotonic_ns()
        super().read(destination, spans)
        self.pace(spans, started_ns)

    def pace(self, spans: SpanArray, started_ns: int) -> None:
        """Wait for what is left of an expander's time."""
        keep_pace(
            started_ns,
            spans,
            self.block_bytes,
            bytes_per_s=self._bytes_per_s,
            latency_ns=self._latency_ns,
        )


def keep_pace(
    started_ns: int,
    spans: SpanArray,
    block_bytes: int,
    *,
    bytes_per_s: int = BYTES_PER_S,
    latency_ns: int = LATENCY_NS,
) -> None:
    """Wait until an expander would have copied the spans, too."""
    num_bytes = int(spans[:, 2].sum()) * block_bytes
    takes_ns = len(spans) * latency_ns + num_bytes * NS_PER_S // bytes_per_s
    left_ns = started_ns + takes_ns - time.monotonic_ns()
    if left_ns > 0:
        time.sleep(left_ns / NS_PER_S)
