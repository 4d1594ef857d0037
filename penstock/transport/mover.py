"""The block mover of a worker: checks a `Move` against both pools, and carries it out.

It owns what must be true of a peer before a byte is read: its incarnation, its layout, its sizes.
It does not know what is in the blocks, who decided to move them, nor when to forget a peer: the
worker core says so, through the runtime.

`execute` blocks for as long as the copy takes and is called on a thread for each peer; `add_peer`
and `forget` come from the event loop. The owner of the pool has no part in a move: its loop spends
nothing on being read.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec import structs

from penstock.core.block import KVLayout
from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import BadRequest, BlocksCorrupt, DeadlineExceeded, PeerLost
from penstock.core.events import Move, MoveClass, MoveDone, Reshape
from penstock.core.types import BlockId, Digest, WorkerId
from penstock.kv.tiers import RAW
from penstock.transfer.digest import take_digests
from penstock.transfer.generation import COUNTER_BYTES, counter_spans, counters, is_stale
from penstock.transfer.plan import SpanArray, cut, span_array
from penstock.transfer.region import PeerMemory, Region, bounds_error
from penstock.transfer.reshape import plan_reshape, whole_blocks
from penstock.transport.cuda_ipc import CudaIpc, CudaRegion, MappedCudaPool, OwnCudaPool
from penstock.transport.encoded import ROWS, EncodedReader
from penstock.transport.nixl import NixlRegion
from penstock.transport.peers import Peers
from penstock.transport.reshape import Carried, Reshaper, check
from penstock.transport.shm import MappedPool, SharedMemory
from penstock.transport.tcp import ServedRegion
from penstock.transport.way import Source, Way

Pool = Region | CudaRegion
"""Memory of a group's blocks: the host's, or a GPU's."""
_Pull = tuple[Source, Pool, SpanArray]
_Landed = tuple[str, Carried]
"""By what it came, and what came."""


class BlockMover:
    """Copies blocks of peers into this worker's pools, one region per KV group.

    A peer has a region of counters for each of its own (`transfer/generation.py`), read last.
    `ways` are tried in their order; what was used stands in `MoveDone.transport`. Pools of a GPU
    are filled from pools of GPUs, by `CudaIpc` or NIXL; counters are the host's in any case. With
    `readers`, one for each group, blocks may cross encoded.
    Source: KVDirect (arXiv 2501.14743), one-sided reads without a communicator.
    """

    def __init__(
        self,
        layout: KVLayout,
        regions: Sequence[Pool],
        ways: Sequence[Way] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        readers: Sequence[EncodedReader] = (),
    ) -> None:
        sizes = tuple(region.block_bytes for region in regions)
        assert sizes == layout.block_bytes, f"regions of {sizes} bytes a block for {layout}"
        self._layout = layout
        self._regions = tuple(regions)
        self._clock = clock
        self._readers = tuple(readers)
        self._reshaper = Reshaper()
        ways = [SharedMemory()] if ways is None else ways
        self._on_device = next((way for way in ways if isinstance(way, CudaIpc)), None)
        self._peers = Peers(ways)

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""
        self._peers.add(
            PeerMemory(info.worker_id, info.epoch, info.regions, info.endpoints, info.layout)
        )

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Let go of this incarnation of a peer, as soon as no move reads it any more.

        A newer one that has joined already is left alone.
        """
        self._peers.forget(worker_id, epoch)

    def execute(self, move: Move) -> MoveDone:
        """Carry out a move, or return `error`; blocks until it is done.

        Everything is checked before the first byte. Memory that is mapped stays when its owner
        ends; a connection that is lost is an error, within its deadline. Digests of blocks that are
        reshaped are compared here, those of others by `verify.py`.
        """
        started_ns = self._clock()
        landed: list[_Landed] = []
        digests: tuple[tuple[Digest, ...], ...] = ()
        error, is_corrupt, is_too_late = None, False, False
        try:
            landed = self._carry_out(move)
            is_too_late = self._is_stale(move)
            digests = tuple(map(self._digests_of, self._regions, move.reshapes))
            digests = digests or _digests_of_encoded(move, landed)
        except BlocksCorrupt:
            is_corrupt = True
        except (PeerLost, DeadlineExceeded, BadRequest, OverflowError) as failure:
            error = str(failure)
        if is_too_late:
            error = f"{move.source} had handed out a block anew before it was read to the end"
        return MoveDone(
            move_id=move.move_id,
            num_bytes=sum(part.num_bytes for _, part in landed),
            num_spans=sum(part.num_spans for _, part in landed),
            transport="+".join(dict.fromkeys(name for name, _ in landed)) or "none",
            started_ns=started_ns,
            finished_ns=self._clock(),
            error=error,
            is_corrupt=is_corrupt,
            is_stale=is_too_late,
            digests=digests,
            codec=next((part.codec for _, part in landed), RAW),
            codec_ns=sum(part.codec_ns for _, part in landed),
        )

    def _digests_of(self, region: Pool, wanted: Reshape) -> tuple[Digest, ...]:
        """Return the digests of what a reshape has filled, if it came with digests itself."""
        assert isinstance(region, Region), "a GPU's blocks are not reshaped"
        whole = whole_blocks(wanted, self._layout.block_size) if wanted.source.digests else ()
        return take_digests(region.blocks, whole)

    def _is_stale(self, move: Move) -> bool:
        """Tell whether the peer has handed out a block of the move anew since it was offered."""
        for group, (spans, offered) in enumerate(_blocks_read(move)):
            if not offered:
                continue
            source = self._peers.source(move.source, move.epoch, len(self._regions) + group)
            if spans[:, 2].sum() != len(offered) or source.block_bytes != COUNTER_BYTES:
                raise PeerLost(f"{move.source} has offered something else than it describes")
            packed = counter_spans(spans)
            wrong = bounds_error(
                packed, source_blocks=source.num_blocks, destination_blocks=len(offered)
            )
            if wrong is not None:
                raise PeerLost(f"counters of {move.source}: {wrong}")
            found = Region(np.empty((len(offered), COUNTER_BYTES), np.uint8))
            source.pull(found, packed)
            if is_stale(counters(found.blocks), offered):
                return True
        return False

    def _carry_out(self, move: Move) -> list[_Landed]:
        """Do what the move asks for. Raises: what each way of doing it raises."""
        if move.kind in (MoveClass.RELOCATE, MoveClass.VERIFY):
            return self._within(move)
        if move.destination is not None:
            return self._push(move, move.destination)
        if move.codec != RAW and (rows := self._rows(move)):
            return self._copy_encoded(move, rows)
        return self._reshape(move) if move.reshapes else self._copy(move)

    def _push(self, move: Move, to: WorkerId) -> list[_Landed]:
        """Write blocks of ours into a peer's. Raises: `PeerLost` where no way leads to writing."""
        landed: list[_Landed] = []
        for source, own, spans in self._pulls(structs.replace(move, source=to)):
            if not isinstance(source, MappedPool):
                raise PeerLost(f"{source.name} does not write: push is for workers of one host")
            if not isinstance(own, Region):
                raise PeerLost("blocks of a GPU are pulled, not pushed")
            source.push(own, spans)
            num_bytes = int(spans[:, 2].sum()) * own.block_bytes
            landed.append((source.name, Carried(num_bytes, len(spans))))
        return landed

    def _copy(self, move: Move) -> list[_Landed]:
        """Copy the spans of every group. Raises: as `_pulls`, and for what a pull raises."""
        landed = []
        for source, destination, spans in self._pulls(move):
            _pull(source, destination, spans)
            num_bytes = int(spans[:, 2].sum()) * destination.block_bytes
            landed.append((source.name, Carried(num_bytes, len(spans))))
        return landed

    def _rows(self, move: Move) -> list[Source]:
        """Return the peer's pools as rows of the move's codec, one for each group; none where the
        way there has them not: then blocks cross as they are.
        """
        memory = self._peers.memory(move.source, move.epoch)
        first, count = 2 * len(self._regions), len(self._regions)  # behind pools and counters
        described = memory.regions[first : first + count]
        is_served = len(described) == len(self._readers) == count and all(
            region.kind == ROWS
            and region.location == move.codec == reader.codec.name
            and region.block_bytes == reader.row_bytes
            for region, reader in zip(described, self._readers, strict=True)
        )
        plain = self._peers.source(move.source, move.epoch, 0) if is_served else None
        if not isinstance(plain, ServedRegion):
            return []
        return [self._peers.source(move.source, move.epoch, first + i) for i in range(count)]

    def _copy_encoded(self, move: Move, rows: Sequence[Source]) -> list[_Landed]:
        """Copy as `_copy` does, but rows, which are decoded. Raises: also `BlocksCorrupt`."""
        landed = []
        indices = [index for index, spans in enumerate(move.spans) if spans]
        for index, (source, destination, spans) in zip(indices, self._pulls(move), strict=True):
            offered = move.digests[index]
            if rows[index].num_blocks != source.num_blocks or len(offered) != spans[:, 2].sum():
                raise PeerLost(f"{move.source} has offered something else than it describes")
            assert isinstance(destination, Region), "a GPU's blocks do not cross encoded"
            carried = self._readers[index].pull(rows[index], destination, spans, offered)
            landed.append((f"{source.name} {move.codec}", carried))
        return landed

    def _within(self, move: Move) -> list[_Landed]:
        """Copy blocks within our own pools, or leave those alone that are only to be verified.

        Raises: `BadRequest` for spans outside them.
        """
        landed: list[_Landed] = []
        for region, spans in zip(self._regions, move.spans, strict=True):
            array = span_array(spans)
            count = region.num_blocks
            wrong = bounds_error(array, source_blocks=count, destination_blocks=count)
            if wrong is not None:
                raise BadRequest(f"move {move.move_id}: {wrong}")
            own = self._own(region)
            if move.kind is MoveClass.RELOCATE:
                _pull(own, region, array)
            landed.append(
                (own.name, Carried(int(array[:, 2].sum()) * region.block_bytes, len(array)))
            )
        return landed

    def _own(self, region: Pool) -> Source:
        """Return a pool of ours as one to read from."""
        if isinstance(region, Region):
            return MappedPool(region)
        assert self._on_device is not None, "a pool on a GPU, and no way to move its blocks"
        return self._on_device.own(region)

    def _reshape(self, move: Move) -> list[_Landed]:
        """Bring the wanted tokens of every group into blocks of our shape.

        Raises: `PeerLost` when the peer is not what the move expects or lacks heads of ours,
        `BadRequest` for a plan that cannot be, `BlocksCorrupt`.
        """
        if len(move.reshapes) != len(self._regions):
            raise PeerLost(f"{len(move.reshapes)} reshapes for {len(self._regions)} groups")
        theirs = self._layout_of(move)
        if not set(self._layout.kv_heads) <= set(theirs.kv_heads):
            held, needed = theirs.kv_heads, self._layout.kv_heads
            raise PeerLost(f"{move.source} holds KV heads {held}, we need {needed}")
        ready = []
        for index, (region, wanted) in enumerate(zip(self._regions, move.reshapes, strict=True)):
            plan = plan_reshape(theirs, self._layout, index, wanted)
            if not isinstance(region, Region):
                raise PeerLost("blocks on a GPU have to be of one shape on both sides")
            if len(plan.source_ids):
                source = self._peers.source(move.source, move.epoch, index)
                check(plan, source, region)
                ready.append((plan, source, region))
        carry_out = self._reshaper.carry_out
        return [(source.name, carry_out(plan, source, region)) for plan, source, region in ready]

    def _pulls(self, move: Move) -> list[_Pull]:
        """Return what to pull from where for each group that the move touches, opened and checked.

        Raises: `PeerLost` when the peer, this incarnation of it, or its memory is not what the move
        expects, `OverflowError` for numbers that are no blocks.
        """
        if len(move.spans) != len(self._regions):
            raise PeerLost(f"{len(move.spans)} groups of spans for {len(self._regions)} groups")
        layout = self._layout_of(move)
        if layout != self._layout:
            reason = self._layout.incompatibility(layout) or "the move does not reshape"
            raise PeerLost(f"{move.source} keeps blocks of another layout: {reason}")
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

    def _layout_of(self, move: Move) -> KVLayout:
        """Return the peer's layout. Raises: `PeerLost` when its regions are not those of it."""
        memory = self._peers.memory(move.source, move.epoch)
        if memory.layout is None or len(memory.regions) < len(self._regions):
            raise PeerLost(f"{move.source} describes {len(memory.regions)} regions")
        return memory.layout


def _digests_of_encoded(move: Move, landed: Sequence[_Landed]) -> tuple[tuple[Digest, ...], ...]:
    """Return the digests of what came encoded, per group; () when it came as it was."""
    parts = iter(landed)
    digests = tuple(next(parts)[1].digests if spans else () for spans in move.spans)
    return digests if any(digests) else ()


def _pull(source: Source, destination: Pool, spans: SpanArray) -> None:
    """Copy spans. Raises: `PeerLost` where a GPU's memory would be filled from the host's, and what
    `Source.pull` raises.
    """
    if isinstance(source, MappedCudaPool | OwnCudaPool | NixlRegion):
        source.pull(destination, spans)
    elif isinstance(destination, Region):
        source.pull(destination, spans)  # of any other kind: they know the host's memory alone
    else:
        raise PeerLost(f"{source.name} does not lead into the memory of a GPU")


def _blocks_read(move: Move) -> Iterator[tuple[SpanArray, tuple[int, ...]]]:
    """Return the peer's blocks that a move reads, and their generations as offered, per group."""
    for reshape in move.reshapes:
        block_ids = reshape.source.block_ids
        order = [BlockId(i) for i in range(len(block_ids))]
        yield cut(block_ids, order), reshape.source.generations
    for spans, generations in zip(move.spans, move.generations, strict=False):
        yield span_array(spans), generations
