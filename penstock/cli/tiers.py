"""Tiers below the workers' pools, from the command line to memory and files: `--kv-tier`.

`cli/host.py` opens them in a worker's process. Each worker gets its share of what is said for the
host, with a file of its own on disk, by its name; it alone writes it, and all read it. In which
codec blocks lie there was decided when the model was loaded (`runtime/tier_codecs.py`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from penstock.codec.codec import make_codec
from penstock.core.block import KVLayout
from penstock.core.descriptors import TierRegion
from penstock.core.errors import StartupFailed
from penstock.core.events import Move, MoveDone
from penstock.core.tiers import TierConfig
from penstock.core.types import GIB, MIB, NS_PER_MS, NS_PER_S
from penstock.kv.tiers import RAW, Tier
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import AUTO, ClusterSettings, ModelFacts, TierCodec
from penstock.server.tokenizer import load_tokenizer
from penstock.transfer.region import Region
from penstock.transport.coded import CodedTier, slot_fingerprint
from penstock.transport.cxl import cxl_kind, open_cxl
from penstock.transport.disk import DiskTier
from penstock.transport.sibling import SiblingTiers
from penstock.transport.tier import MemoryTier, Readable, TierStore
from penstock.transport.tier_mover import OpenTier, TierMover

if TYPE_CHECKING:
    from penstock.engine.model import LoadedModel
    from penstock.runtime.tier_codecs import Chosen

RATES: Final = {Tier.DRAM.value: 5 * GIB, Tier.CXL.value: 5 * GIB, Tier.DISK.value: GIB // 2}
"""Bytes per second to expect until a move has been measured."""
LATENCY_NS: Final = NS_PER_MS // 10

log = logging.getLogger(__name__)


def check_tiers(
    settings: ClusterSettings,
    layout: KVLayout | None,
    codecs: Sequence[TierCodec] | None = None,
) -> None:
    """Refuse what cannot be, before a worker is forked. `codecs` are those that were decided, None
    while they have not been. Raises: `StartupFailed`.
    """
    if layout is None:
        return
    if settings.handoff_codec != RAW and (len(layout.groups) > 1 or layout.groups[0].window):
        raise StartupFailed("--handoff-codec: not for models with sliding windows yet")
    if not settings.tiers:
        return
    if len(layout.groups) > 1 or layout.groups[0].window:
        raise StartupFailed("--kv-tier: models with sliding windows cannot use tiers yet")
    if not settings.is_prefix_caching:
        raise StartupFailed("--kv-tier is of no use with --no-prefix-caching")
    is_coded = any(tier.codec not in ("", RAW, AUTO) for tier in settings.tiers)
    if codecs is not None and not codecs and is_coded:
        raise StartupFailed("--kv-tier: codecs are measured on a model, and here is none")
    for tier, codec in zip(settings.tiers, _codecs(settings, codecs or ()), strict=True):
        if not _num_slots(tier.num_bytes, settings, codec, layout):
            raise StartupFailed(
                f"--kv-tier {tier.name}: {tier.num_bytes / MIB:.1f} MiB hold no block of "
                f"{_slot_bytes(codec, layout)} bytes for each worker"
            )


def choose_codecs(
    settings: ClusterSettings,
    model: "LoadedModel",
    folder: Path,
    progress: Callable[[str, float], None],
) -> "Chosen":
    """Decide in which codec blocks lie in each tier, by what codecs do to this model.

    Raises: `StartupFailed` when what was asked for is above the budget, or is not to be had.
    """
    from penstock.runtime.codecs import PROBE
    from penstock.runtime.tier_codecs import tier_codecs

    def probe() -> list[int]:
        progress("measuring KV codecs on the model", 0.99)
        return load_tokenizer(folder).encode(PROBE.read_text(encoding="utf-8"))

    return tier_codecs(
        model,
        settings.tiers,
        settings.kv_quality,
        probe,
        block_size=settings.engine.block_size,
        wire=settings.handoff_codec,
    )


def describe_tiers(
    settings: ClusterSettings, layout: KVLayout | None = None, codecs: Sequence[TierCodec] = ()
) -> str:
    """Return in a line what is below the KV caches; "" for nothing."""
    names = {Tier.CXL.value: cxl_kind()}
    parts = []
    for tier, codec in zip(settings.tiers, _codecs(settings, codecs), strict=True):
        size, name = f"{tier.num_bytes / MIB:.0f} MiB", names.get(tier.name, tier.name)
        parts.append(f"{size} {name} {tier.path}".rstrip())
        if codec.name != RAW and layout is not None:
            share = _slot_bytes(codec, layout) / layout.block_bytes[0]
            parts[-1] += f" as {codec.name} (slots of {share:.2f} blocks)"
    count = settings.num_workers
    return ", ".join(parts) + (f"; shared by {count} workers" if parts and count > 1 else "")


@dataclass(frozen=True, slots=True, eq=False)
class WorkerTier:
    """One worker's share of a tier, and the codec that its slots are in."""

    store: TierStore
    codec: TierCodec
    coded: CodedTier | None

    @property
    def slots(self) -> OpenTier:
        """What a mover is to read and write."""
        return self.coded or self.store


def open_tiers(
    settings: ClusterSettings,
    spec: WorkerSpec,
    layout: KVLayout,
    codecs: Sequence[TierCodec] = (),
) -> dict[str, WorkerTier]:
    """Return this worker's share of each tier, nearest first. Raises: `StartupFailed`."""
    opened: dict[str, WorkerTier] = {}
    for tier, codec in zip(settings.tiers, _codecs(settings, codecs), strict=True):
        num_slots = _num_slots(tier.num_bytes, settings, codec, layout)
        slot_bytes = _slot_bytes(codec, layout)
        store: TierStore
        if tier.name == Tier.DISK.value:
            path = Path(tier.path).expanduser() / f"{spec.worker_id}.kv"
            fingerprint = slot_fingerprint(layout.fingerprint(), codec.name)
            store = DiskTier(path, num_slots, slot_bytes, fingerprint)
        elif tier.name == Tier.CXL.value:
            store = open_cxl(num_slots, slot_bytes)
        else:
            store = MemoryTier(num_slots, slot_bytes)
        coded = _around(store, codec.name, layout, is_steady=True)
        opened[tier.name] = WorkerTier(store, codec, coded)
        size = num_slots * slot_bytes / MIB
        log.info("%s: %.0f MiB of %s", spec.worker_id, size, opened[tier.name].slots.kind)
    return opened


def tier_configs(tiers: Mapping[str, WorkerTier], eviction: str) -> tuple[TierConfig, ...]:
    """Return what the worker core is to know of its tiers."""
    return tuple(
        TierConfig(
            name=name,
            num_slots=tier.store.num_slots,
            bytes_per_s=_bytes_per_s(name, tier),
            latency_ns=LATENCY_NS,
            kept=tuple(tier.store.contents()),
            label=tier.store.kind,
            codec=tier.codec.name,
            is_lossy=tier.codec.is_lossy,
            slot_bytes=tier.store.block_bytes,
            decode_ns=tier.codec.decode_ns,
            eviction=eviction,
        )
        for name, tier in tiers.items()
    )


def tier_regions(tiers: Mapping[str, WorkerTier]) -> tuple[TierRegion, ...]:
    """Return where siblings find this worker's tiers."""
    return tuple(
        TierRegion(name, tier.store.kind, tier.store.descriptor, tier.codec.name)
        for name, tier in tiers.items()
    )


def sibling_tiers(spec: WorkerSpec, facts: ModelFacts) -> SiblingTiers:
    """Return what reads the tiers of the other workers of this host, codecs included."""
    layout = facts.layout
    assert layout is not None, facts

    def wrap(tier: TierRegion, slots: Readable) -> Readable | CodedTier:
        # Their owner may write a slot while it is read.
        return _around(slots, tier.codec, layout, is_steady=False) or slots

    return SiblingTiers(spec.worker_id, layout.fingerprint(), wrap)


def with_tiers(
    execute: Callable[[Move], MoveDone],
    tiers: Mapping[str, WorkerTier],
    regions: tuple[Region, ...],
    clock: Callable[[], int],
    siblings: SiblingTiers,
) -> Callable[[Move], MoveDone]:
    """Return an `execute` that also carries out moves between the pool and tiers."""
    if not tiers:
        return execute
    slots = {name: tier.slots for name, tier in tiers.items()}
    mover = TierMover(regions[0], slots, clock, siblings)
    return lambda move: execute(move) if move.tiers is None else mover.execute(move)


def _codecs(settings: ClusterSettings, codecs: Sequence[TierCodec]) -> Sequence[TierCodec]:
    return codecs or (TierCodec(),) * len(settings.tiers)


def _around(slots: Readable, codec: str, layout: KVLayout, *, is_steady: bool) -> CodedTier | None:
    if codec == RAW:
        return None
    return CodedTier(slots, make_codec(codec, layout), is_steady=is_steady)


def _slot_bytes(codec: TierCodec, layout: KVLayout) -> int:
    return codec.slot_bytes or layout.block_bytes[0]


def _num_slots(
    num_bytes: int, settings: ClusterSettings, codec: TierCodec, layout: KVLayout
) -> int:
    return num_bytes // (max(1, settings.num_workers) * _slot_bytes(codec, layout))


def _bytes_per_s(name: str, tier: WorkerTier) -> int:
    """Return at what rate blocks come out, in their own bytes: copied as slots, then decoded."""
    store, codec = tier.store, tier.codec
    block_bytes = tier.coded.codec.block_bytes if tier.coded else store.block_bytes
    copy_ns = store.block_bytes * NS_PER_S / (codec.bytes_per_s or RATES[name])
    return int(block_bytes * NS_PER_S / (copy_ns + codec.decode_ns))
