"""A double of `NixlAgent` within one process, so that what stands on it is tested without NIXL.

It refuses what NIXL refuses: metadata that is not an agent's, blocks outside what is registered,
memory that was let go, an agent that has ended, a list of both kinds of memory. What it takes for a
GPU's is the host's.
"""

import ctypes
import secrets
from collections.abc import Callable

from penstock.core.errors import PeerLost
from penstock.transfer.region import Region
from penstock.transport.cuda_ipc import CudaRegion
from penstock.transport.nixl_agent import Entries, Rows


class DoubleAgent:
    """Reads by copying, once `watch` has been asked. With `is_silent` no read comes to an end."""

    agents: dict[str, "DoubleAgent"]
    """All that have not ended, by their names; one dictionary for each test."""
    is_silent = False

    def __init__(self, *, is_owner: bool) -> None:
        self.name = secrets.token_hex(8)
        self.is_owner = is_owner
        self.regions: dict[int, Region] = {}
        self.known: dict[str, tuple[DoubleAgent, dict[int, Region]]] = {}
        self.lists: dict[int, tuple[DoubleAgent, Rows]] = {}
        self.agents[self.name] = self

    @property
    def metadata(self) -> bytes:
        return f"agent {self.name} {len(self.regions)}".encode()

    def register(self, region: Region) -> None:
        self.regions[region.address] = region

    def unregister(self, region: Region) -> None:
        del self.regions[region.address]
        for agent, rows in self.lists.values():
            whole = all(self.has(*row[:2]) for row in rows.tolist())
            assert agent is not self or whole, "a list of it is kept"

    def add(self, metadata: bytes) -> str:
        agent = next((a for a in self.agents.values() if a.metadata == metadata), None)
        if agent is None:
            raise PeerLost("NIXL does not understand its metadata")
        self.known[agent.name] = agent, dict(agent.regions)
        return agent.name

    def remove(self, name: str) -> None:
        del self.known[name]

    def prepare(self, name: str | None, rows: Rows, *, is_gpu: bool = False) -> int:
        agent, regions = (self, self.regions) if name is None else self.known[name]
        for address, size, device in rows.tolist():
            if not _is_inside(regions, address, size, device if is_gpu else None):
                raise PeerLost("NIXL finds the blocks outside what is registered")
        self.lists[len(self.lists)] = agent, rows
        return len(self.lists) - 1

    def has(self, address: int, size: int) -> bool:
        devices = {None, *(r.device for r in self.regions.values() if isinstance(r, CudaRegion))}
        return any(_is_inside(self.regions, address, size, device) for device in devices)

    def release(self, prepared: int) -> None:
        self.lists[prepared] = self, self.lists[prepared][1][:0]

    def read(
        self, ours: tuple[int, Entries], theirs: tuple[int, Entries], watch: Callable[[], None]
    ) -> None:
        watch()
        while self.is_silent:
            watch()
        (reader, to), (owner, start) = self.lists[ours[0]], self.lists[theirs[0]]
        assert self.name in self.agents, "this agent has ended"
        if owner.name not in self.agents:
            raise PeerLost("NIXL cannot read: NIXL_ERR_REMOTE_DISCONNECT")
        for mine, other in zip(ours[1].tolist(), theirs[1].tolist(), strict=True):
            (into, size, _), (address, expected, _) = to[mine].tolist(), start[other].tolist()
            assert size == expected
            assert reader.has(into, size), "into memory that is not registered any more"
            ctypes.memmove(into, address, size)

    def close(self) -> None:
        del self.agents[self.name]


def _is_inside(
    regions: dict[int, Region | CudaRegion], address: int, size: int, device: int | None
) -> bool:
    return any(
        start <= address
        and address + size <= start + region.capacity_bytes
        and device == (region.device if isinstance(region, CudaRegion) else None)
        for start, region in regions.items()
    )
