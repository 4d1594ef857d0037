"""`Agent`: the transfer library on its own, for any two Python programs.

Owns one process's registered memory, its peers, and the server that answers them. Register memory
once, give the descriptor to whomever it concerns (by any means: it holds no secret), then move
blocks by their numbers. Peers come and go at any moment; there is no communicator and no order in
which to start. The serving stack does not use this class: its workers have `mover.py` over the same
ways. See `examples/move_tensor.py`.

    CONNECT    descriptor() there, connect() here     once for each pair
    TRANSFER   pull(peer, blocks, into, blocks)       only numbers of blocks travel
               pull_tokens(peer, wanted, into)        between KV pools of different shapes
    COMPLETE   notify(peer, data), notifications()    once for each request
"""

import secrets
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import BadRequest
from penstock.core.events import Reshape
from penstock.transfer.plan import BlockIds, cut
from penstock.transfer.region import PeerMemory, Region, bounds_error
from penstock.transfer.reshape import plan_reshape
from penstock.transport import wire
from penstock.transport.key import cluster_key
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import is_worthwhile
from penstock.transport.nixl_owner import NixlOwner
from penstock.transport.peers import Peers
from penstock.transport.reshape import Reshaper
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.way import Way

AUTO: Final = "auto"
DESCRIPTOR_BYTES_MAX: Final = 1 << 20
NAME_BYTES_MAX: Final = 255
_PRIVATE: Final = ""
"""Kind of memory that nobody can map."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One incarnation of another agent."""

    name: str
    epoch: int


class Pulled(Struct, frozen=True):
    """What a pull took: by which transport, how much was read in how many spans."""

    transport: str
    num_bytes: int
    num_spans: int
    seconds: float


class Agent:
    """This process's end. Serves reads from construction to `close`; a context manager.

    `transport` is auto (shared memory on one host, else NIXL where both have it and RDMA, else
    TCP), shm, nixl or tcp. `host` is where to listen: other hosts need more than the loopback of
    the default; `advertised` is what they call when that is not the same; NIXL finds both by
    itself. `key` is what every peer must know, `cluster_key()` by default.
    `layout` says that the regions are the groups of a KV pool, in its order; peers with a layout
    can then be pulled from in any shape, and those of another model are refused.
    Raises: `StartupFailed` when the key or the address cannot be used, `BackendUnavailable` when
    NIXL is asked for and missing.
    """

    def __init__(
        self,
        name: str = "",
        *,
        transport: str = AUTO,
        host: str = "127.0.0.1",
        port: int = 0,
        advertised: str | None = None,
        key: bytes | None = None,
        layout: KVLayout | None = None,
    ) -> None:
        self.name = name or f"agent-{secrets.token_hex(4)}"
        self.epoch = secrets.randbits(62) + 1
        assert len(self.name.encode()) <= NAME_BYTES_MAX, self.name
        key = cluster_key() if key is None else key
        self._tcp = Tcp(key)
        kinds = [AUTO, SharedMemory.kind, Nixl.kind, Tcp.kind]
        if transport not in kinds:
            raise BadRequest(f"transport {transport!r} is none of {kinds}", "transport")
        has_nixl = transport == Nixl.kind or (transport == AUTO and is_worthwhile())
        ways: list[Way] = [SharedMemory(), *([Nixl()] if has_nixl else []), self._tcp]
        self._peers = Peers([way for way in ways if transport in (AUTO, way.kind)])
        self._nixl_owner = NixlOwner(self.epoch) if has_nixl else None
        self._owner = TcpOwner(self.epoch, key, host=host, port=port, advertised=advertised)
        self._descriptors: list[RegionDescriptor] = []
        self._pools: list[SharedPool] = []
        self._layout = layout
        self._reshaper = Reshaper()

    def __enter__(self) -> "Agent":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ CONNECT

    def allocate(self, num_blocks: int, block_bytes: int) -> Region:
        """Register new memory that peers on this host can map: the fastest there is.

        `blocks` is [num_blocks, block_bytes] uint8, zero. Raises: `StartupFailed`.
        """
        pool = SharedPool(num_blocks, block_bytes)
        self._pools.append(pool)
        self._serve(pool.region, pool.descriptor)
        return pool.region

    def register(self, array: npt.NDArray[Any]) -> Region:
        """Register memory that exists, [num_blocks, ...] of any type; peers cannot map it.

        `array[i]` is block i. It is not copied, and must not be freed before `close`. A torch
        tensor is passed as `tensor.view(torch.uint8).numpy()`.
        Raises: `BadRequest` when it is empty or not contiguous.
        """
        if array.ndim < 1 or not array.nbytes or not array.flags.c_contiguous:
            raise BadRequest(f"memory of shape {array.shape} is empty or not contiguous", "array")
        region = Region(array.reshape(len(array), -1).view(np.uint8))
        self._serve(
            region, RegionDescriptor(_PRIVATE, "", region.capacity_bytes, region.block_bytes)
        )
        return region

    def descriptor(self) -> bytes:
        """Return what a peer needs to read all that is registered by now.

        It holds no secret, unless this agent serves reads through NIXL.
        """
        endpoints = [self._owner.endpoint]
        if self._nixl_owner is not None:
            endpoints.append(self._nixl_owner.endpoint)
        regions = tuple(self._descriptors)
        memory = PeerMemory(self.name, self.epoch, regions, tuple(endpoints), self._layout)
        return msgspec.msgpack.encode(memory)

    def connect(self, descriptor: bytes) -> Peer:
        """Know a peer by its descriptor; nothing is opened before the first pull.

        A peer that came back is a new incarnation: what is asked of the old one is refused.
        Raises: `BadRequest` when it is not a descriptor, or that of a KV pool which does not go
        together with ours: the message has both fingerprints.
        """
        if len(descriptor) > DESCRIPTOR_BYTES_MAX:
            raise BadRequest(f"{len(descriptor)} bytes are too long for a descriptor")
        try:
            memory = msgspec.msgpack.decode(descriptor, type=PeerMemory)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"not a descriptor: {error}") from error
        if not 0 < memory.epoch < 1 << 64:
            raise BadRequest(f"not a descriptor: {memory.epoch} is no epoch")
        if self._layout is not None and memory.layout is not None:
            refusal = self._layout.incompatibility(memory.layout)
            if refusal is not None:
                raise BadRequest(f"{memory.name} is refused: {refusal}")
        self._peers.add(memory)
        return Peer(memory.name, memory.epoch)

    def disconnect(self, peer: Peer) -> None:
        """Let go of this incarnation of a peer."""
        self._peers.forget(peer.name, peer.epoch)

    # ----------------------------------------------------------------------- TRANSFER and COMPLETE

    def pull(
        self,
        peer: Peer,
        source_blocks: BlockIds,
        into: Region,
        destination_blocks: BlockIds,
        *,
        region: int = 0,
    ) -> Pulled:
        """Copy `source_blocks[i]` of the peer's region `region` to `destination_blocks[i]`.

        Blocks the caller, not the interpreter; the peer's program takes no part. Regions are
        numbered as they were registered. Numbers may be lists or int64 arrays.
        Raises: `BadRequest` for blocks that are not inside both regions, before a byte is moved;
        `PeerLost` and `DeadlineExceeded` when the peer is gone, came back or is silent, and then
        the destination blocks hold nothing of use.
        """
        started = time.perf_counter()
        source = self._peers.source(peer.name, peer.epoch, region)
        if source.block_bytes != into.block_bytes:
            raise BadRequest(f"blocks of {source.block_bytes} and {into.block_bytes} bytes")
        if len(source_blocks) != len(destination_blocks):
            raise BadRequest(f"{len(source_blocks)} blocks into {len(destination_blocks)}")
        try:
            spans = cut(source_blocks, destination_blocks)
        except OverflowError as error:
            raise BadRequest(f"not the number of a block: {error}") from error
        wrong = bounds_error(
            spans, source_blocks=source.num_blocks, destination_blocks=into.num_blocks
        )
        if wrong is not None:
            raise BadRequest(wrong)
        source.pull(into, spans)
        num_bytes = len(source_blocks) * into.block_bytes
        return Pulled(source.name, num_bytes, len(spans), time.perf_counter() - started)

    def pull_tokens(self, peer: Peer, wanted: Reshape, into: Region, *, group: int = 0) -> Pulled:
        """Bring tokens out of the peer's KV blocks into ours, whatever the shapes of both.

        `wanted` says which tokens, and the blocks on both sides: entry i of a table of blocks holds
        the tokens from i times its block size on. Block sizes, dtypes and KV heads held may differ:
        the heads that both hold are written, so a pool is filled from the shards of a
        tensor-parallel group by a pull from each. Numbers are rounded to nearest even. Where
        `wanted.source` has digests, nothing is written of a block that has another one.
        Raises: as `pull`; `BadRequest` also when either side has no layout; `BlocksCorrupt`.
        """
        started = time.perf_counter()
        theirs = self._peers.memory(peer.name, peer.epoch).layout
        if self._layout is None or theirs is None:
            raise BadRequest("both agents must have been made with a layout")
        if not 0 <= group < len(self._layout.groups):
            raise BadRequest(f"there is no group {group}")
        try:
            plan = plan_reshape(theirs, self._layout, group, wanted)
        except OverflowError as error:
            raise BadRequest(f"not the number of a block: {error}") from error
        source = self._peers.source(peer.name, peer.epoch, group)
        done = self._reshaper.carry_out(plan, source, into)
        seconds = time.perf_counter() - started
        return Pulled(source.name, done.num_bytes, done.num_spans, seconds)

    def notify(self, peer: Peer, data: bytes) -> None:
        """Leave up to 65,000 bytes with a peer, which finds them in `notifications`.

        Raises: `PeerLost` when the peer is gone, came back or takes no more, `DeadlineExceeded`.
        """
        name = self.name.encode()
        text = bytes([len(name)]) + name + data
        if len(text) > wire.TEXT_MAX:
            raise BadRequest(f"{len(data)} bytes are too long for a notification", "data")
        self._tcp.connection(self._peers.memory(peer.name, peer.epoch)).notify(text)

    def notifications(self) -> list[tuple[str, bytes]]:
        """Take what peers have left: (name of the peer, data), in the order of arrival.

        Does not wait. Names are what peers who know the cluster key call themselves.
        """
        found = []
        while (text := self._owner.heard()) is not None:
            size = text[0]
            found.append((text[1 : 1 + size].decode(errors="replace"), text[1 + size :]))
        return found

    def close(self) -> None:
        """Leave: no peer can read from here any more, and nothing is open to any."""
        self._peers.close()
        self._tcp.close()
        self._owner.close()
        if self._nixl_owner is not None:
            self._nixl_owner.close()
        for pool in self._pools:
            pool.close()

    def _serve(self, region: Region, descriptor: RegionDescriptor) -> None:
        self._descriptors.append(descriptor)
        self._owner.add(region)
        if self._nixl_owner is not None:
            self._nixl_owner.add(region)
