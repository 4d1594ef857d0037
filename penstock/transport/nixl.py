"""The way to memory of peers through NIXL over UCX: one-sided reads, by RDMA where there is any.

For each region, its own and a peer's, a list of descriptors is prepared once; a pull names entries
of two lists. Regions may be on GPUs: UCX then copies between the two, or reads into one over RDMA.
With every pull comes a page on which the owner keeps its epoch: memory that answers
at an address which is used again is found out, without the owner's help.

When to take it: UCX authenticates nobody, and where it has nothing better than TCP it emulates
reads, three times slower than `tcp.py`, in a way in which a reader that ends in the middle of a
read can abort the owner's process. So `auto` takes it where there is RDMA (`has_rdma`), and the
network has to be the cluster's own. On one host it reads the owner's memory through the kernel.

`nixl_owner.py` is the other end, `nixl_agent.py` the library.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.errors import BackendUnavailable, DeadlineExceeded, PeerLost
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import PeerMemory, Region, described_blocks
from penstock.transport.cuda_ipc import CudaRegion
from penstock.transport.nixl_agent import NIXL, Entries, NixlAgent, Rows
from penstock.transport.nixl_owner import PAGE, NixlAddress, address_of_owner
from penstock.transport.tcp import BYTES_PER_S_MIN, SILENCE_S

DESTINATIONS_MAX: Final = 64
"""Regions to pull into that stay registered."""
_NOTHING: Final = np.empty((0, 3), np.int64)
_ONE: Final = np.zeros(1, np.int32)
Pool = Region | CudaRegion


@dataclass(eq=False, slots=True)
class _Peer:
    """What is known of one incarnation of a peer."""

    name: str
    epoch: int
    address: NixlAddress
    is_forgotten: bool = False


class Nixl:
    """The way to peers that serve reads through NIXL. A pull may take `silence_s` and its size.

    One pull at a time; others wait for it. Memory that is pulled into is registered at the first
    pull and kept, as long as it is among the last `DESTINATIONS_MAX`.
    Raises: `BackendUnavailable` when NIXL is missing or cannot start.
    """

    kind: Final = NIXL

    def __init__(self, *, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._reader: _Reader | None = _Reader()
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def open(self, peer: PeerMemory, index: int) -> "NixlRegion":
        """Connect with a peer and read its page.

        Raises: `PeerLost` when it serves no reads through NIXL, does not answer, or is another.
        """
        address = address_of_owner(peer)
        if index >= len(address.bases):
            raise PeerLost(f"it serves {len(address.bases)} regions through NIXL")
        with self._lock:
            known = self._peers.setdefault(
                (peer.name, peer.epoch), _Peer(peer.name, peer.epoch, address)
            )
            if known.address != address and self._reader is not None:
                self._reader.drop(known)
            known.address = address
        region = NixlRegion(self, known, index, peer)
        try:
            self.read(region)
        except DeadlineExceeded as error:
            raise PeerLost(str(error)) from error
        return region

    def read(
        self, source: "NixlRegion", destination: Pool | None = None, spans: SpanArray = _NOTHING
    ) -> None:
        """Read spans of a region, and the owner's page; without spans the page alone.

        What fails may still be under way, so everything that was open is given up and opened anew
        when it is wanted: nothing may land in blocks that are in other use by then.
        Raises: `PeerLost`, `DeadlineExceeded`.
        """
        num_bytes = int(spans[:, 2].sum()) * source.block_bytes
        limit_s = self._silence_s + num_bytes / BYTES_PER_S_MIN
        peer = source.peer
        with self._lock:
            watch = self._watch(peer, limit_s)
            watch()
            try:
                self._reader = self._reader or _Reader()
                self._reader.read(source, destination, spans, watch)
            except (PeerLost, BackendUnavailable) as error:
                self._give_up()
                raise PeerLost(f"{peer.name}: {error}") from error
            except DeadlineExceeded:
                self._give_up()
                raise
            self._sweep()

    def forget(self, name: str, epoch: int) -> None:
        """Give up what is open to this incarnation; a pull under way fails."""
        peer = self._peers.pop((name, epoch), None)
        if peer is None:
            return
        peer.is_forgotten = True
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Give up everything; waits until a pull under way has noticed."""
        self._is_closed = True
        with self._lock:
            self._give_up()

    def _watch(self, peer: _Peer, limit_s: float) -> Callable[[], None]:
        deadline = time.monotonic() + limit_s

        def watch() -> None:
            if peer.is_forgotten or self._is_closed:
                raise PeerLost(f"{peer.name} was forgotten")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{peer.name} was silent or slow for {limit_s:.1f} s")

        return watch

    def _sweep(self) -> None:
        if self._reader is not None:
            for peer in [peer for peer in self._reader.opened if peer.is_forgotten]:
                self._reader.drop(peer)

    def _give_up(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


class NixlRegion:
    """A region of a peer that is read through NIXL."""

    name: Final = NIXL

    def __init__(self, way: Nixl, peer: _Peer, index: int, memory: PeerMemory) -> None:
        self._way = way
        self.peer = peer
        self.index = index
        self.num_blocks = described_blocks(memory.regions[index])
        self.block_bytes = memory.regions[index].block_bytes

    def pull(self, destination: Pool, spans: SpanArray) -> None:
        """Read spans that lie inside both regions; the interpreter is free meanwhile.

        Raises: `PeerLost` when the peer is gone or came back, `DeadlineExceeded` when it is silent.
        """
        self._way.read(self, destination, spans)


# ------------------------------------------------------------------------------------- the reader


@dataclass(slots=True)
class _Opened:
    """A peer as our agent knows it: its name there, the list of its page alone, and that of each
    region.
    """

    agent_name: str
    page: int
    lists: dict[int, int] = field(default_factory=dict)


class _Reader:
    """An agent that reads. Not for several threads at once.

    The last entry of every list of the host's memory is the owner's page, or the place where it
    lands. Lists of a GPU's have none, so where one is in it the page is read behind the blocks.
    """

    def __init__(self) -> None:
        self.opened: dict[_Peer, _Opened] = {}
        self._agent = NixlAgent(is_owner=False)
        self._landed = Region(np.zeros((1, PAGE.size), np.uint8))
        self._agent.register(self._landed)
        self._page_alone = self._agent.prepare(None, _rows(0, 0, 0, page=self._landed.address))
        self._destinations: OrderedDict[tuple[int, ...], tuple[Pool, int]] = OrderedDict()

    def read(
        self,
        source: NixlRegion,
        destination: Pool | None,
        spans: SpanArray,
        watch: Callable[[], None],
    ) -> None:
        """Read spans and the page. Raises: `PeerLost`, `BackendUnavailable`, what `watch` does."""
        peer = source.peer
        theirs, ours, last = self._source(source), self._page_alone, 0
        if destination is not None:
            ours, last = self._destination(destination), destination.num_blocks
        self._landed.blocks[:] = 0
        starts, to, counts = spans.T
        ends = _entries(to, counts, last), _entries(starts, counts, source.num_blocks)
        if peer.address.device(source.index) is None and not isinstance(destination, CudaRegion):
            self._agent.read((ours, ends[0]), (theirs, ends[1]), watch)
        else:
            if len(spans):
                self._agent.read((ours, ends[0][:-1]), (theirs, ends[1][:-1]), watch)
            page = self._opened(peer).page
            self._agent.read((self._page_alone, _ONE), (page, _ONE), watch)
        if self._landed.blocks.tobytes() != PAGE.pack(peer.epoch, peer.address.token):
            raise PeerLost("it is in another epoch: what was known of it is out of date")

    def drop(self, peer: _Peer) -> None:
        """Give up what is open to a peer."""
        opened = self.opened.pop(peer, None)
        if opened is not None:
            for prepared in (opened.page, *opened.lists.values()):
                self._agent.release(prepared)
            self._agent.remove(opened.agent_name)

    def close(self) -> None:
        """End the agent: no read lands any more."""
        self.opened.clear()
        self._agent.close()

    def _opened(self, peer: _Peer) -> _Opened:
        if peer not in self.opened:
            name = self._agent.add(peer.address.metadata)
            if any(name == opened.agent_name for opened in self.opened.values()):
                raise PeerLost("it gives the metadata of another peer")
            page = self._agent.prepare(name, _rows(0, 0, 0, page=peer.address.page))
            self.opened[peer] = _Opened(name, page)
        return self.opened[peer]

    def _source(self, source: NixlRegion) -> int:
        opened, address = self._opened(source.peer), source.peer.address
        if source.index not in opened.lists:
            base, device = address.bases[source.index], address.device(source.index)
            rows = _rows(base, source.num_blocks, source.block_bytes, page=address.page)
            if device is not None:
                rows = _on_device(rows, device)
            opened.lists[source.index] = self._agent.prepare(
                opened.agent_name, rows, is_gpu=device is not None
            )
        return opened.lists[source.index]

    def _destination(self, region: Pool) -> int:
        is_gpu = isinstance(region, CudaRegion)
        key = (region.address, region.num_blocks, region.block_bytes)
        if key not in self._destinations:
            if len(self._destinations) >= DESTINATIONS_MAX:
                oldest, prepared = self._destinations.popitem(last=False)[1]
                self._agent.release(prepared)
                self._agent.unregister(oldest)
            self._agent.register(region)
            rows = _rows(*key, page=self._landed.address)
            if isinstance(region, CudaRegion):
                rows = _on_device(rows, region.device)
            self._destinations[key] = region, self._agent.prepare(None, rows, is_gpu=is_gpu)
        self._destinations.move_to_end(key)
        return self._destinations[key][1]


def _rows(base: int, num_blocks: int, block_bytes: int, *, page: int) -> Rows:
    """Return address, length and device 0 of every block, then of the page."""
    rows = np.zeros((num_blocks + 1, 3), np.uint64)
    rows[:-1, 0] = np.arange(num_blocks, dtype=np.uint64) * np.uint64(block_bytes) + np.uint64(base)
    rows[:-1, 1] = block_bytes
    rows[-1, :2] = page, PAGE.size
    return rows


def _on_device(rows: Rows, device: int) -> Rows:
    """Return the same blocks as a device's, without the page."""
    rows[:, 2] = device
    return rows[:-1]


def _entries(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], last: int) -> Entries:
    """Return the numbers of all blocks of some runs, and `last` behind them."""
    if len(starts) == 1:  # the usual hand-off, at a fifth of the cost
        start, count = int(starts[0]), int(counts[0])
        entries = np.arange(start, start + count + 1, dtype=np.int32)
        entries[count] = last
        return entries
    ends = np.cumsum(counts)
    num_blocks = int(ends[-1]) if len(ends) else 0
    blocks = np.arange(num_blocks) + np.repeat(starts - ends + counts, counts)
    return np.append(blocks, last).astype(np.int32)
