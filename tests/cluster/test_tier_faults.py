"""Real tiers under the real core, and everything that can happen to them: a full disk, a file cut
short, flipped bits in file and memory, a killed worker. Seeded; every token of every client is
checked, and the books after every event. What is wrong is found, computed again, and counted.
"""

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from penstock.core.events import Move, MoveDone
from penstock.core.tiers import TierConfig
from penstock.core.types import BlockHash, Digest, Role
from penstock.sim.clock import SimClock
from penstock.sim.executor import chain_layout
from penstock.sim.tiers import SimTier, SimTiers, Slots
from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Bytes2D, Region
from penstock.transport.disk import DiskTier
from penstock.transport.tier import MemoryTier, TierStore
from penstock.transport.tier_mover import TierMover
from tests.sim.test_tiers import BLOCK_SIZE, DISK, DRAM, loads, make_spec, run

(BLOCK_BYTES,) = chain_layout(BLOCK_SIZE).block_bytes


class FullDisk(DiskTier):
    """A disk that has no space left for a while."""

    is_full = False

    def write(
        self,
        source: Region,
        spans: SpanArray,
        names: Sequence[BlockHash],
        digests: Sequence[Digest],
    ) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(source, spans, names, digests)


class RealTiers(SimTiers):
    """Tiers whose bytes lie in memory and in a file, moved by the mover of a real worker."""

    folder: ClassVar[Path]
    done: ClassVar[Counter[str]]
    alive: "ClassVar[RealTiers | None]"

    def __init__(
        self, specs: Sequence[SimTier], slots: dict[str, Slots], clock: SimClock, rng: random.Random
    ) -> None:
        super().__init__(specs, slots, clock, rng)
        if RealTiers.alive is not None:
            RealTiers.alive.close()  # what a process holds goes with it
        RealTiers.alive = self
        self._path = self.folder / "worker.kv"
        self._disk = FullDisk(self._path, DISK.num_slots, BLOCK_BYTES, "these blocks")
        self._memory = MemoryTier(DRAM.num_slots, BLOCK_BYTES)
        self._stores: dict[str, TierStore] = {"dram": self._memory, "disk": self._disk}

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def configs(self) -> tuple[TierConfig, ...]:
        return tuple(
            msgspec.structs.replace(config, kept=tuple(self._stores[config.name].contents()))
            for config in super().configs()
        )

    def submit(
        self,
        pool: Bytes2D,
        move: Move,
        is_alive: Callable[[], bool],
        done: Callable[[MoveDone], None],
        *,
        owner: Callable[[], SimTiers | None],
    ) -> None:
        mover = TierMover(Region(pool), self._stores, self._clock.now_ns)

        def land() -> None:
            if is_alive():
                self._hurt()
                done(mover.execute(move))

        self._clock.call_at(self._clock.now_ns() + self._rng.randint(10_000, 300_000), land)

    def _hurt(self) -> None:
        """Have something happen, now and then."""
        draw = self._rng.random()
        self._disk.is_full = draw < 0.05
        if draw < 0.05:
            self.done["full"] += 1
        elif draw < 0.15:
            self._flip_in_file()
        elif draw < 0.2:
            self.done["flipped in memory"] += 1
            slot, at = self._rng.randrange(DRAM.num_slots), self._rng.randrange(BLOCK_BYTES)
            self._memory.region.blocks[slot, at] ^= 1 << self._rng.randrange(8)
        elif draw < 0.23:
            self.done["cut short"] += 1
            os.truncate(self._path, self._place())

    def _flip_in_file(self) -> None:
        at = self._place()
        with self._path.open("r+b") as file:
            file.seek(at)
            if byte := file.read(1):
                self.done["flipped in file"] += 1
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << self._rng.randrange(8)]))

    def _place(self) -> int:
        """Return an offset among the slots: they are the end of the file."""
        slots = DISK.num_slots * BLOCK_BYTES
        return max(0, os.path.getsize(self._path) - self._rng.randint(1, slots))


def test_whatever_happens_is_found_computed_again_counted_and_never_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.sim.run.SimTiers", RealTiers)
    counted: Counter[str] = Counter()
    RealTiers.done = Counter()
    for seed in range(6):
        RealTiers.folder, RealTiers.alive = tmp_path / str(seed), None
        roles = {"m0": Role.MIXED}
        small = replace(make_spec(DRAM, DISK, roles=roles), num_blocks=(20,))
        cluster = run(small, seed, kills=seed % 3)
        for found in loads(cluster).values():
            for load in found:
                counted["hits"] += load.num_hits
                counted["corrupt"] += load.num_corrupt
                counted["failed"] += load.num_failed
        assert RealTiers.alive is not None
        RealTiers.alive.close()
    assert set(RealTiers.done) == {"full", "flipped in file", "flipped in memory", "cut short"}
    assert counted["hits"] > 50
    assert counted["corrupt"] > 3
    assert counted["failed"] > 3
