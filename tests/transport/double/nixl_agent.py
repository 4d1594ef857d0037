"""A double of `NixlAgent` within one process, so that what stands on it is tested without NIXL.

It refuses what NIXL refuses: metadata that is not an agent's, blocks outside what is registered,
memory that was let go, an agent that has ended.
"""

import ctypes
import secrets
from collections.abc import Callable

from penstock.core.errors import PeerLost
from penstock.transfer.region import Region
from penstock.transport.nixl_agent import Entries, Rows


class DoubleAgent:
    """Reads by copying, once `watch` has been asked. With `is_silent` no read comes to an end."""

    agents: dict[bytes, "DoubleAgent"]
    """All that have not ended, by their metadata; one dictionary for each test."""
    is_silent = False

    def __init__(self, *, is_owner: bool) -> None:
        self.name = secrets.token_hex(8)
        self.metadata = f"agent {self.name} {is_owner}".encode()
        self.regions: dict[int, Region] = {}
        self.known: dict[str, DoubleAgent] = {}
        self.lists: dict[int, tuple[DoubleAgent, Rows]] = {}
        self.agents[self.metadata] = self

    def register(self, region: Region) -> None:
        self.regions[region.address] = region

    def unregister(self, region: Region) -> None:
        del self.regions[region.address]

    def add(self, metadata: bytes) -> str:
        if metadata not in self.agents:
            raise PeerLost("NIXL does not understand its metadata")
        agent = self.agents[metadata]
        self.known[agent.name] = agent
        return agent.name

    def remove(self, name: str) -> None:
        del self.known[name]

    def prepare(self, name: str | None, rows: Rows) -> int:
        agent = self if name is None else self.known[name]
        for address, size, _ in rows.tolist():
            if not agent.has(address, size):
                raise PeerLost("NIXL finds the blocks outside what is registered")
        self.lists[len(self.lists)] = agent, rows
        return len(self.lists) - 1

    def has(self, address: int, size: int) -> bool:
        return any(
            start <= address and address + size <= start + region.capacity_bytes
            for start, region in self.regions.items()
        )

    def release(self, prepared: int) -> None:
        self.lists[prepared] = self, self.lists[prepared][1][:0]

    def read(
        self, ours: tuple[int, Entries], theirs: tuple[int, Entries], watch: Callable[[], None]
    ) -> None:
        watch()
        while self.is_silent:
            watch()
        (reader, to), (owner, start) = self.lists[ours[0]], self.lists[theirs[0]]
        assert self.agents.get(self.metadata) is self, "this agent has ended"
        if self.agents.get(owner.metadata) is not owner:
            raise PeerLost("NIXL cannot read: NIXL_ERR_REMOTE_DISCONNECT")
        for mine, other in zip(ours[1].tolist(), theirs[1].tolist(), strict=True):
            (into, size, _), (address, expected, _) = to[mine].tolist(), start[other].tolist()
            assert size == expected
            assert reader.has(into, size), "into memory that is not registered any more"
            ctypes.memmove(into, address, size)

    def close(self) -> None:
        del self.agents[self.metadata]
