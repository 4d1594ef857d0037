"""The peers that a process knows, and the ways that are open to them.

A region is opened at the first pull that needs it, by the first way that leads there: joining costs
nothing, and nobody waits for a peer that is never read. Knows no layout and no request. Used by
`mover.py` for workers and by `agent.py` for everybody else.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.errors import PeerLost
from penstock.transfer.region import PeerMemory, described_blocks
from penstock.transport.way import Source, Way


@dataclass(slots=True)
class _Peer:
    memory: PeerMemory
    sources: dict[int, Source] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Peers:
    """Who may be read, and how. `ways` are tried in their order."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = tuple(ways)
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()

    def add(self, memory: PeerMemory) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""
        with self._lock:
            old = self._peers.get(memory.name)
            self._peers[memory.name] = _Peer(memory)
        if old is not None and old.memory.epoch != memory.epoch:
            self._give_up(old.memory)

    def forget(self, name: str, epoch: int) -> None:
        """Let go of this incarnation, as soon as no pull reads it any more.

        A newer one that has joined already is left alone.
        """
        with self._lock:
            peer = self._peers.get(name)
            if peer is None or peer.memory.epoch != epoch:
                return
            del self._peers[name]
        self._give_up(peer.memory)

    def memory(self, name: str, epoch: int) -> PeerMemory:
        """Return what is known of a peer's memory.

        Raises: `PeerLost` when nobody is known by that name, or in that epoch.
        """
        return self._find(name, epoch).memory

    def source(self, name: str, epoch: int, index: int) -> Source:
        """Return a peer's region, opened now if it was not yet.

        Raises: `PeerLost` with what each way says when none leads there.
        """
        peer = self._find(name, epoch)
        source = peer.sources.get(index)
        if source is not None:
            return source
        with peer.lock:
            if index not in peer.sources:
                peer.sources[index] = self._open(peer.memory, index)
            return peer.sources[index]

    def close(self) -> None:
        """Let go of everybody."""
        with self._lock:
            self._peers.clear()
        for way in self._ways:
            way.close()

    def _find(self, name: str, epoch: int) -> _Peer:
        with self._lock:
            peer = self._peers.get(name)
        if peer is None:
            raise PeerLost(f"no peer {name} is known")
        if peer.memory.epoch != epoch:
            raise PeerLost(f"{name} is in epoch {peer.memory.epoch}, the blocks are of {epoch}")
        return peer

    def _open(self, memory: PeerMemory, index: int) -> Source:
        if not 0 <= index < len(memory.regions):
            raise PeerLost(f"{memory.name} has no region {index}")
        descriptor = memory.regions[index]
        refusals = []
        for way in self._ways:
            try:
                source = way.open(memory, index)
            except PeerLost as refusal:
                refusals.append(f"{way.kind}: {refusal}")
                continue
            described = (described_blocks(descriptor), descriptor.block_bytes)
            assert (source.num_blocks, source.block_bytes) == described, descriptor
            return source
        why = "; ".join(refusals)
        raise PeerLost(f"no way to {descriptor.kind} memory of {memory.name} ({why})")

    def _give_up(self, memory: PeerMemory) -> None:
        for way in self._ways:
            way.forget(memory.name, memory.epoch)
