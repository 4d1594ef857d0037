"""The tiers of other workers of this host, as `Siblings` (`worker/siblings.py`) reads them.

Memory is mapped like a pool, a file on disk is opened for reading; the owner has no part in it and
is not asked. What is read may have been given to another block meanwhile: a digest shows it to
whoever asked. A tier is opened when it is first read and let go when its owner is gone; then, and
where it cannot be opened, a read is an error. `tier_mover.py` reads, on several threads; `add_peer`
and `forget` come from the event loop.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.descriptors import TierRegion, WorkerInfo
from penstock.core.errors import PeerLost
from penstock.core.types import WorkerId
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Region, described_blocks
from penstock.transport.coded import CodedTier, slot_fingerprint
from penstock.transport.cxl import EMULATED, keep_pace
from penstock.transport.disk import DISK_KIND, DiskReader
from penstock.transport.shm import copy_spans, open_peer
from penstock.transport.tier import Readable


class MappedSlots:
    """Slots in a sibling's memory, at the rate at which the sibling itself reads them."""

    def __init__(self, label: str, region: Region) -> None:
        self.kind = label
        self.num_slots = region.num_blocks
        self.block_bytes = region.block_bytes
        self._region = region

    def read(self, destination: Region, spans: SpanArray) -> None:
        """Copy slots into blocks."""
        started_ns = time.monotonic_ns()
        copy_spans(self._region, destination, spans)
        if self.kind == EMULATED:
            keep_pace(started_ns, spans, self._region.block_bytes)


@dataclass(slots=True)
class _Sibling:
    info: WorkerInfo
    tiers: dict[str, Readable | CodedTier] = field(default_factory=dict)
    files: list[DiskReader] = field(default_factory=list)
    is_gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class SiblingTiers:
    """Who they are. `fingerprint` is that of the layout of our blocks; `wrap` puts what decodes a
    tier's slots around them.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        fingerprint: str,
        wrap: Callable[[TierRegion, Readable], Readable | CodedTier] = lambda _, slots: slots,
    ) -> None:
        self.worker_id = worker_id
        self._fingerprint = fingerprint
        self._wrap = wrap
        self._siblings: dict[WorkerId, _Sibling] = {}

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a worker; a new incarnation takes the place of the old one."""
        before = self._siblings.get(info.worker_id)
        self._siblings[info.worker_id] = _Sibling(info)
        if before is not None:
            self._give_up(before)

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Let go of this incarnation; a newer one is left alone. Reads under way are let finish."""
        sibling = self._siblings.get(worker_id)
        if sibling is None or sibling.info.epoch != epoch:
            return
        self._give_up(self._siblings.pop(worker_id))

    def find(self, worker_id: WorkerId, epoch: int, tier: str) -> Readable | CodedTier:
        """Return a sibling's tier, opened now if it was not yet.

        Raises: `PeerLost` when that incarnation is not known, or its tier cannot be opened.
        """
        sibling = self._siblings.get(worker_id)
        if sibling is None or sibling.info.epoch != epoch:
            raise PeerLost(f"{worker_id} in epoch {epoch} is not known")
        with sibling.lock:
            if sibling.is_gone:
                raise PeerLost(f"{worker_id} is gone")
            if tier not in sibling.tiers:
                region = _region(sibling.info, tier)
                slots = self._open(region)
                if isinstance(slots, DiskReader):
                    sibling.files.append(slots)
                sibling.tiers[tier] = self._wrap(region, slots)
            return sibling.tiers[tier]

    def _give_up(self, sibling: _Sibling) -> None:
        with sibling.lock:
            sibling.is_gone = True
            for file in sibling.files:
                file.close()

    def _open(self, tier: TierRegion) -> Readable:
        if tier.region.kind == DISK_KIND:
            return self._open_file(tier)
        return MappedSlots(tier.label, open_peer(tier.region))

    def _open_file(self, tier: TierRegion) -> DiskReader:
        region, fingerprint = tier.region, slot_fingerprint(self._fingerprint, tier.codec)
        path, num_slots = Path(region.location), described_blocks(region)
        try:
            return DiskReader(path, num_slots, region.block_bytes, fingerprint)
        except OSError as error:
            raise PeerLost(f"{path} cannot be read: {error}") from error


def _region(info: WorkerInfo, name: str) -> TierRegion:
    for tier in info.tiers:
        if tier.name == name:
            return tier
    raise PeerLost(f"{info.worker_id} has no tier {name}")
