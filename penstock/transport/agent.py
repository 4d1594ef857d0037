"""The block mover of a worker: knows where peers' blocks lie, and carries out a `Move`.

It owns which peers are known, in which incarnation, and which of their pools are mapped. A pool is
mapped at the first move that needs it, so joining costs nothing and nobody waits for a peer that is
never read. It does not know what is in the blocks, who decided to move them, nor when to forget a
peer: the worker core says so, through the runtime.

`execute` blocks for as long as the copy takes and is called on a thread of its own; `add_peer` and
`forget` come from the event loop. The owner of the pool has no part in a move: its loop spends
nothing on being read.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from penstock.core.block import KVLayout
from penstock.core.errors import PeerLost
from penstock.core.events import Move, MoveDone, RegionDescriptor, WorkerInfo
from penstock.core.types import WorkerId
from penstock.transfer.region import Region, bounds_error
from penstock.transport import shm

OPENERS: Final[dict[str, Callable[[RegionDescriptor], Region]]] = {
    shm.MEMFD: shm.open_peer,
    shm.FILE: shm.open_peer,
}
"""How to reach a region of each kind."""


@dataclass(slots=True)
class _Peer:
    info: WorkerInfo
    regions: dict[int, Region] = field(default_factory=dict)


class BlockMover:
    """Copies blocks of peers into this worker's pools, one region per KV group.

    Source: KVDirect (arXiv 2501.14743), one-sided reads without a communicator; our pools are
    mapped, not registered.
    """

    def __init__(
        self,
        layout: KVLayout,
        regions: Sequence[Region],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        sizes = tuple(region.block_bytes for region in regions)
        assert sizes == layout.block_bytes, f"regions of {sizes} bytes a block for {layout}"
        self._layout = layout
        self._regions = tuple(regions)
        self._clock = clock
        self._peers: dict[WorkerId, _Peer] = {}
        self._lock = threading.Lock()

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""
        with self._lock:
            self._peers[info.worker_id] = _Peer(info)

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Unmap this incarnation of a peer, as soon as no move reads it any more.

        A newer one that has joined already is left alone.
        """
        with self._lock:
            peer = self._peers.get(worker_id)
            if peer is not None and peer.info.epoch == epoch:
                del self._peers[worker_id]

    def execute(self, move: Move) -> MoveDone:
        """Copy all spans of a move, or none and return `error`; blocks until it is done.

        Everything is checked before the first byte. A peer that ends while it is read takes nothing
        away: what is mapped stays.
        """
        started_ns = self._clock()
        num_bytes, error = 0, None
        try:
            sources = self._sources(move)
            for source, destination, spans in zip(sources, self._regions, move.spans, strict=True):
                if source is not None:
                    num_bytes += shm.copy_spans(source.blocks, destination.blocks, spans)
        except PeerLost as lost:
            error = str(lost)
        return MoveDone(
            move_id=move.move_id,
            num_bytes=num_bytes,
            num_spans=sum(map(len, move.spans)) if error is None else 0,
            transport="shm",
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
        )

    def _sources(self, move: Move) -> list[Region | None]:
        """Return the peer's region for each group that the move touches, checked and mapped.

        Raises: `PeerLost` when the peer, this incarnation of it, or its memory is not what the move
        expects.
        """
        if len(move.spans) != len(self._regions):
            raise PeerLost(f"{len(move.spans)} groups of spans for {len(self._regions)} groups")
        with self._lock:
            peer = self._find(move.source, move.epoch)
            sources = [self._map(peer, i) if spans else None for i, spans in enumerate(move.spans)]
        for source, destination, spans in zip(sources, self._regions, move.spans, strict=True):
            if source is None:
                continue
            wrong = bounds_error(
                spans, source_blocks=source.num_blocks, destination_blocks=destination.num_blocks
            )
            if wrong is not None:
                raise PeerLost(f"move {move.move_id} from {move.source}: {wrong}")
        return sources

    def _find(self, worker_id: WorkerId, epoch: int) -> _Peer:
        peer = self._peers.get(worker_id)
        if peer is None:
            raise PeerLost(f"no peer {worker_id} is known")
        info = peer.info
        if info.epoch != epoch:
            raise PeerLost(f"{worker_id} is in epoch {info.epoch}, the blocks are of {epoch}")
        if info.layout != self._layout:
            raise PeerLost(f"{worker_id} keeps blocks of another layout: {info.layout}")
        if len(info.regions) != len(self._regions):
            raise PeerLost(f"{worker_id} describes {len(info.regions)} regions")
        return peer

    def _map(self, peer: _Peer, index: int) -> Region:
        if index not in peer.regions:
            descriptor = peer.info.regions[index]
            opener = OPENERS.get(descriptor.kind)
            if opener is None:
                raise PeerLost(f"no way to {descriptor.kind} memory of {peer.info.worker_id}")
            region = opener(descriptor)
            if region.block_bytes != self._regions[index].block_bytes:
                raise PeerLost(f"{descriptor} has blocks of another size than group {index}")
            peer.regions[index] = region
        return peer.regions[index]
