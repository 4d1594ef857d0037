"""A worker's memory: the pools of its KV, and how blocks get into them and out of them.

Put together here for pools in shared memory of the host and for pools on a device. The composition
of a worker (`host.py`) takes one and does not ask which it is.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from penstock.cli.tiers import (
    open_tiers,
    sibling_tiers,
    tier_configs,
    tier_regions,
    with_tiers,
)
from penstock.codec.codec import make_codec
from penstock.core.block import KVLayout
from penstock.core.config import WireCodec
from penstock.core.descriptors import Endpoint, RegionDescriptor, TierRegion
from penstock.core.events import Move, MoveDone
from penstock.core.step import Step
from penstock.core.tiers import TierConfig
from penstock.core.types import GIB, MIB, Digest
from penstock.kv.pool import Generations
from penstock.runtime.link import WorkerSpec
from penstock.runtime.links import Probe
from penstock.runtime.settings import (
    AUTO,
    INSTANT_EXECUTOR,
    ClusterSettings,
    ModelFacts,
    NetworkSettings,
)
from penstock.runtime.worker import KnowsPeers, WorkerPlace
from penstock.transfer.generation import COUNTER_BYTES, counters
from penstock.transfer.region import Region
from penstock.transport.cuda_driver import CudaDriver, Driver
from penstock.transport.encoded import ROWS, EncodedReader, row_bytes
from penstock.transport.key import cluster_key
from penstock.transport.mover import BlockMover
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import is_worthwhile
from penstock.transport.nixl_owner import NixlOwner
from penstock.transport.probe import Prober
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.verify import digests_by, digests_of, no_digests, verified, verified_by
from penstock.transport.way import Way

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

POPULATED_BYTES = 2 * GIB
"""Part of a KV cache whose pages are taken before a request touches them."""
POPULATED_PIECE_BYTES = 32 * MIB


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """What a worker is made of beside its core and its model.

    `tensors` views each pool as [num_blocks, layers, 2, block_size, num_kv_heads, head_dim].
    """

    tensors: Callable[[], "list[Tensor]"]
    digest: Callable[[Step], tuple[tuple[Digest, ...], ...]]
    move: Callable[[Move], MoveDone]
    generations: tuple[Generations, ...] = ()
    peers: tuple[KnowsPeers, ...] = ()
    regions: tuple[RegionDescriptor, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    tier_configs: tuple[TierConfig, ...] = ()
    tiers: tuple[TierRegion, ...] = ()
    wire: WireCodec | None = None
    probe: Probe = lambda _info, _moved_bytes: ()


def host_memory(
    settings: ClusterSettings, facts: ModelFacts, spec: WorkerSpec, place: WorkerPlace
) -> WorkerMemory:
    """Return pools in memory that other processes of this host can map."""
    layout = facts.layout
    assert layout is not None, facts
    pools = tuple(map(SharedPool, facts.num_blocks, layout.block_bytes))
    regions = tuple(pool.region for pool in pools)
    shared_counters = tuple(SharedPool(count, COUNTER_BYTES) for count in facts.num_blocks)
    shared = (*pools, *shared_counters)
    Thread(target=_populate, args=(pools,), name="populate", daemon=True).start()
    ways, owners = _ways(settings, spec.epoch, tuple(pool.region for pool in shared))
    wire, rows = _serve_rows(facts, layout, owners, facts.num_blocks[0])
    readers = [EncodedReader(make_codec(wire.name, layout))] if wire is not None else []
    mover = BlockMover(layout, regions, ways, place.time.now_ns, readers)
    stores = open_tiers(settings, spec, layout, facts.tier_codecs)
    siblings = sibling_tiers(spec, facts)
    move = with_tiers(
        verified(mover.execute, regions), stores, regions, place.time.now_ns, siblings
    )
    # What the instant executor leaves in its blocks means nothing: there is nothing to verify.
    is_instant = settings.executor == INSTANT_EXECUTOR
    return WorkerMemory(
        tensors=partial(_tensors, regions, layout),
        digest=no_digests if is_instant else partial(digests_of, regions=regions),
        move=move,
        generations=tuple(counters(pool.region.blocks) for pool in shared_counters),
        peers=(mover, siblings),
        regions=(*(pool.descriptor for pool in shared), *rows),
        endpoints=tuple(owner.endpoint for owner in owners),
        tier_configs=tier_configs(stores, settings.kv_eviction),
        tiers=tier_regions(stores),
        wire=wire,
        probe=_prober(settings, ways).probe,
    )


def device_memory(
    settings: ClusterSettings,
    facts: ModelFacts,
    spec: WorkerSpec,
    place: WorkerPlace,
    pools: "DevicePools",
) -> WorkerMemory:
    """Return pools in a GPU's memory, which workers on GPUs of this host pull from each other.

    Counters of generations are in the host's memory, as are tiers.
    Raises: `BackendUnavailable` for memory that cannot be shared.
    """
    from penstock.runtime.device_moves import device_moves
    from penstock.transport.device_tiers import DeviceTierMover

    layout = facts.layout
    assert layout is not None, facts
    moves = device_moves(pools.tensors, device=pools.index, make_driver=pools.make_driver)
    shared_counters = tuple(SharedPool(count, COUNTER_BYTES) for count in facts.num_blocks)
    mover = BlockMover(layout, moves.regions, [moves.way, SharedMemory()], place.time.now_ns)
    stores = open_tiers(settings, spec, layout, facts.tier_codecs)
    siblings = sibling_tiers(spec, facts)
    execute = verified_by(mover.execute, moves.takes)
    if stores:
        tiers = DeviceTierMover(
            moves.regions[0],
            {name: tier.slots for name, tier in stores.items()},
            moves.takes[0],
            moves.make_driver,
            make_codec=moves.make_codec,
            clock=place.time.now_ns,
            siblings=siblings,
        )
        execute = partial(_either, execute, tiers.execute)
    return WorkerMemory(
        tensors=lambda: list(pools.tensors),
        digest=partial(digests_by, takes=moves.takes),
        move=execute,
        generations=tuple(counters(pool.region.blocks) for pool in shared_counters),
        peers=(mover, siblings),
        regions=(*moves.descriptors, *(pool.descriptor for pool in shared_counters)),
        tier_configs=tier_configs(stores, settings.kv_eviction),
        tiers=tier_regions(stores),
    )


@dataclass(frozen=True, slots=True)
class DevicePools:
    """A pool for each KV group on device `index`, and how its driver is reached."""

    tensors: "tuple[Tensor, ...]"
    index: int = 0
    make_driver: Callable[[], Driver] = CudaDriver


def _either(
    from_peers: Callable[[Move], MoveDone], between_tiers: Callable[[Move], MoveDone], move: Move
) -> MoveDone:
    return from_peers(move) if move.tiers is None else between_tiers(move)


def _tensors(regions: Sequence[Region], layout: KVLayout) -> "list[Tensor]":
    import torch

    from penstock.engine.pools import pool_shape

    dtype = getattr(torch, layout.dtype)
    return [
        torch.from_numpy(region.blocks).view(dtype).view(pool_shape(layout, group, -1))
        for group, region in enumerate(regions)
    ]


def _ways(
    settings: ClusterSettings, epoch: int, regions: tuple[Region, ...]
) -> tuple[list[Way], list[NixlOwner | TcpOwner]]:
    """Return how this worker reads its peers, and by whom it is read itself.

    Nothing listens unless it is asked for or other hosts take part: workers of one host map each
    other's pools.
    """
    network = settings.network or NetworkSettings(host="127.0.0.1")
    wanted = settings.transport
    if wanted == SharedMemory.kind or (wanted == AUTO and settings.network is None):
        return [SharedMemory()], []
    ways: list[Way] = [SharedMemory()] if wanted == AUTO else []
    owners: list[NixlOwner | TcpOwner] = []
    if wanted == Nixl.kind or (wanted == AUTO and is_worthwhile()):
        ways.append(Nixl())
        owners.append(NixlOwner(epoch))
    if wanted != Nixl.kind:
        key = cluster_key(Path(network.key_file) if network.key_file else None)
        ways.append(Tcp(key, num_streams=settings.tcp_streams))
        owners.append(
            TcpOwner(epoch, key, host=network.host, advertised=network.advertised or None)
        )
    for owner in owners:
        for region in regions:
            owner.add(region)
    return ways, owners


def _serve_rows(
    facts: ModelFacts,
    layout: KVLayout,
    owners: Sequence[NixlOwner | TcpOwner],
    num_blocks: int,
) -> tuple[WireCodec | None, tuple[RegionDescriptor, ...]]:
    """Let peers read the pool encoded as well; return in what, and what they are to know of it."""
    if facts.wire is None:
        return None, ()
    codec = make_codec(facts.wire.name, layout)
    width = row_bytes(codec)
    wire = WireCodec(
        name=codec.name,
        row_bytes=width,
        encode_ns=facts.wire.encode_ns,
        decode_ns=facts.wire.decode_ns,
    )
    (owner,) = (owner for owner in owners if isinstance(owner, TcpOwner))
    if owner.add_encoded(0, codec) is None:
        log.warning("without a C++ compiler KV leaves this worker raw, not in %s", codec.name)
        return wire, ()
    return wire, (RegionDescriptor(ROWS, codec.name, num_blocks * width, width),)


def _prober(settings: ClusterSettings, used: list[Way]) -> Prober:
    """Return what tries every transport there is to a peer, whichever of them are in use."""
    key_file = settings.network.key_file if settings.network else ""
    num_streams = settings.tcp_streams
    made: dict[str, Callable[[], Way]] = {
        SharedMemory.kind: SharedMemory,
        Nixl.kind: Nixl,
        Tcp.kind: lambda: Tcp(
            cluster_key(Path(key_file) if key_file else None), num_streams=num_streams
        ),
    }
    return Prober(made, [way.kind for way in used])


def _populate(pools: tuple[SharedPool, ...]) -> None:
    """Take the pages that the first requests will use, on whatever core has nothing else to do."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    for pool in pools:
        piece = max(1, POPULATED_PIECE_BYTES // pool.region.block_bytes)
        wanted = min(
            POPULATED_BYTES // len(pools) // pool.region.block_bytes, pool.region.num_blocks
        )
        for first in range(0, wanted, piece):
            pool.populate(first, piece)
