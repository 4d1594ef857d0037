"""The block mover of a worker: checks a `Move` against both pools, and carries it out.

It owns what must be true of a peer before a byte is read: its incarnation, its layout, its sizes.
It does not know what is in the blocks, who decided to move them, nor when to forget a peer: the
worker core says so, through the runtime.

`execute` blocks for as long as the copy takes and is called on a thread of its own; `add_peer` and
`forget` come from the event loop. The owner of the pool has no part in a move: its loop spends
nothing on being read.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from penstock.core.block import KVLayout
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.core.events import Move, MoveDone
from penstock.core.messages import WorkerInfo
from penstock.core.types import WorkerId
from penstock.transfer.generation import COUNTER_BYTES, counter_spans, counters, is_stale
from penstock.transfer.plan import SpanArray, span_array
from penstock.transfer.region import PeerMemory, Region, bounds_error
from penstock.transport.peers import Peers
from penstock.transport.shm import SharedMemory
from penstock.transport.way import Source, Way

_Pull = tuple[Source, Region, SpanArray]


class BlockMover:
    """Copies blocks of peers into this worker's pools, one region per KV group.

    A peer has a region of counters for each of its own (`transfer/generation.py`), read last.
    `ways` are tried in their order; what was used stands in `MoveDone.transport`.
    Source: KVDirect (arXiv 2501.14743), one-sided reads without a communicator.
    """

    def __init__(
        self,
        layout: KVLayout,
        regions: Sequence[Region],
        ways: Sequence[Way] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        sizes = tuple(region.block_bytes for region in regions)
        assert sizes == layout.block_bytes, f"regions of {sizes} bytes a block for {layout}"
        self._layout = layout
        self._regions = tuple(regions)
        self._clock = clock
        self._layouts: dict[tuple[str, int], KVLayout] = {}
        self._peers = Peers(ways if ways is not None else [SharedMemory()])

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""
        self._layouts[info.worker_id, info.epoch] = info.layout
        self._peers.add(PeerMemory(info.worker_id, info.epoch, info.regions, info.endpoints))

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Let go of this incarnation of a peer, as soon as no move reads it any more.

        A newer one that has joined already is left alone.
        """
        self._layouts.pop((worker_id, epoch), None)
        self._peers.forget(worker_id, epoch)

    def execute(self, move: Move) -> MoveDone:
        """Copy all spans of a move, or return `error`; blocks until it is done.

        Everything is checked before the first byte. Memory that is mapped stays when its owner
        ends; a connection that is lost is an error, within its deadline.
        """
        started_ns = self._clock()
        pulls: list[_Pull] = []
        error = None
        is_too_late = False
        try:
            pulls = self._pulls(move)
            for source, destination, spans in pulls:
                source.pull(destination, spans)
            is_too_late = self._is_stale(move)
        except (PeerLost, DeadlineExceeded, OverflowError) as failure:
            error = str(failure)
        if is_too_late:
            error = f"{move.source} had handed out a block anew before it was read to the end"
        num_bytes = sum(int(spans[:, 2].sum()) * to.block_bytes for _, to, spans in pulls)
        return MoveDone(
            move_id=move.move_id,
            num_bytes=num_bytes if error is None else 0,
            num_spans=sum(map(len, move.spans)) if error is None else 0,
            transport="+".join(dict.fromkeys(source.name for source, _, _ in pulls)) or "none",
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
            is_stale=is_too_late,
        )

    def _is_stale(self, move: Move) -> bool:
        """Tell whether the peer has handed out a block of the move anew since it was offered."""
        for group, (spans, offered) in enumerate(zip(move.spans, move.generations, strict=False)):
            if not offered:
                continue
            source = self._peers.source(move.source, move.epoch, len(self._regions) + group)
            array = counter_spans(span_array(spans))
            found = Region(np.empty((len(offered), COUNTER_BYTES), np.uint8))
            if array[:, 2].sum() != len(offered) or source.block_bytes != COUNTER_BYTES:
                raise PeerLost(f"{move.source} has offered something else than it describes")
            source.pull(found, array)
            if is_stale(counters(found.blocks), offered):
                return True
        return False

    def _pulls(self, move: Move) -> list[_Pull]:
        """Return what to pull from where for each group that the move touches, opened and checked.

        Raises: `PeerLost` when the peer, this incarnation of it, or its memory is not what the move
        expects, `OverflowError` for numbers that are no blocks.
        """
        if len(move.spans) != len(self._regions):
            raise PeerLost(f"{len(move.spans)} groups of spans for {len(self._regions)} groups")
        self._check_layout(move.source, move.epoch)
        pulls = []
        for index, (destination, spans) in enumerate(zip(self._regions, move.spans, strict=True)):
            if not spans:
                continue
            source = self._peers.source(move.source, move.epoch, index)
            if source.block_bytes != destination.block_bytes:
                raise PeerLost(f"{move.source} has blocks of another size in group {index}")
            array = span_array(spans)
            wrong = bounds_error(
                array, source_blocks=source.num_blocks, destination_blocks=destination.num_blocks
            )
            if wrong is not None:
                raise PeerLost(f"move {move.move_id} from {move.source}: {wrong}")
            pulls.append((source, destination, array))
        return pulls

    def _check_layout(self, worker_id: WorkerId, epoch: int) -> None:
        memory = self._peers.memory(worker_id, epoch)
        layout = self._layouts.get((worker_id, epoch))
        if layout != self._layout:
            raise PeerLost(f"{worker_id} keeps blocks of another layout: {layout}")
        if len(memory.regions) < len(self._regions):
            raise PeerLost(f"{worker_id} describes {len(memory.regions)} regions")
