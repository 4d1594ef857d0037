"""Tiers below the workers' pools, from the command line to memory and files: `--kv-tier`.

`cli/host.py` opens them in a worker's process. Each worker gets its share of what is said for the
host, with a file of its own on disk, by its name; it alone writes it, and all read it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.block import KVLayout
from penstock.core.descriptors import TierRegion
from penstock.core.errors import StartupFailed
from penstock.core.events import Move, MoveDone
from penstock.core.tiers import TierConfig
from penstock.core.types import GIB, MIB, NS_PER_MS
from penstock.kv.tiers import Tier
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import ClusterSettings, TierSettings
from penstock.transfer.region import Region
from penstock.transport.cxl import cxl_kind, open_cxl
from penstock.transport.disk import DiskTier
from penstock.transport.sibling import SiblingTiers
from penstock.transport.tier import MemoryTier, TierStore
from penstock.transport.tier_mover import TierMover

RATES: Final = {Tier.DRAM.value: 5 * GIB, Tier.CXL.value: 5 * GIB, Tier.DISK.value: GIB // 2}
"""Bytes per second to expect until a move has been measured."""
LATENCY_NS: Final = NS_PER_MS // 10

log = logging.getLogger(__name__)


def check_tiers(settings: ClusterSettings, layout: KVLayout | None) -> None:
    """Refuse what cannot be, before a worker is forked. Raises: `StartupFailed`."""
    if not settings.tiers or layout is None:
        return
    if len(layout.groups) > 1 or layout.groups[0].window:
        raise StartupFailed("--kv-tier: models with sliding windows cannot use tiers yet")
    if not settings.is_prefix_caching:
        raise StartupFailed("--kv-tier is of no use with --no-prefix-caching")
    for tier in settings.tiers:
        if _num_slots(tier, settings, layout) < 1:
            raise StartupFailed(
                f"--kv-tier {tier.name}: {tier.num_bytes / MIB:.1f} MiB hold no block of "
                f"{layout.block_bytes[0]} bytes for each worker"
            )


def describe_tiers(settings: ClusterSettings) -> str:
    """Return in a line what is below the KV caches; "" for nothing."""
    names = {Tier.CXL.value: cxl_kind()}
    parts = [
        f"{tier.num_bytes / MIB:.0f} MiB {names.get(tier.name, tier.name)} {tier.path}".rstrip()
        for tier in settings.tiers
    ]
    count = settings.num_workers
    return ", ".join(parts) + (f"; shared by {count} workers" if parts and count > 1 else "")


def open_tiers(
    settings: ClusterSettings, spec: WorkerSpec, layout: KVLayout
) -> dict[str, TierStore]:
    """Return this worker's share of each tier, nearest first. Raises: `StartupFailed`."""
    stores: dict[str, TierStore] = {}
    for tier in settings.tiers:
        num_slots, (block_bytes,) = _num_slots(tier, settings, layout), layout.block_bytes
        if tier.name == Tier.DISK.value:
            path = Path(tier.path).expanduser() / f"{spec.worker_id}.kv"
            stores[tier.name] = DiskTier(path, num_slots, block_bytes, layout.fingerprint())
        elif tier.name == Tier.CXL.value:
            stores[tier.name] = open_cxl(num_slots, block_bytes)
        else:
            stores[tier.name] = MemoryTier(num_slots, block_bytes)
        size = num_slots * block_bytes / MIB
        log.info("%s: %.0f MiB of %s", spec.worker_id, size, stores[tier.name].kind)
    return stores


def tier_configs(stores: dict[str, TierStore], eviction: str) -> tuple[TierConfig, ...]:
    """Return what the worker core is to know of its tiers."""
    return tuple(
        TierConfig(
            name=name,
            num_slots=store.num_slots,
            bytes_per_s=RATES[name],
            latency_ns=LATENCY_NS,
            kept=tuple(store.contents()),
            label=store.kind,
            eviction=eviction,
        )
        for name, store in stores.items()
    )


def tier_regions(stores: dict[str, TierStore]) -> tuple[TierRegion, ...]:
    """Return where siblings find this worker's tiers."""
    return tuple(TierRegion(name, store.kind, store.descriptor) for name, store in stores.items())


def with_tiers(
    execute: Callable[[Move], MoveDone],
    stores: dict[str, TierStore],
    regions: tuple[Region, ...],
    clock: Callable[[], int],
    siblings: SiblingTiers,
) -> Callable[[Move], MoveDone]:
    """Return an `execute` that also carries out moves between the pool and tiers."""
    if not stores:
        return execute
    mover = TierMover(regions[0], stores, clock, siblings)
    return lambda move: execute(move) if move.tiers is None else mover.execute(move)


def _num_slots(tier: TierSettings, settings: ClusterSettings, layout: KVLayout) -> int:
    return tier.num_bytes // (max(1, settings.num_workers) * layout.block_bytes[0])
