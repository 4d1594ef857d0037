"""The KV orchestrator: what computation needs and will need goes in, transfers and jobs come out.

The facade over residency, DMA scheduler, prefetch queue, compression engine and policy for one that
reads block by block, as `penstock/sim/memory.py` does. A worker brings whole prefixes into a pool
with an allocator and a cache of its own: its desks (`worker/tiers.py`, `worker/onboard.py`) use the
same parts themselves. It copies no byte and reads no clock.

Computation reads blocks in one tier, the *target*, where they are raw. The cycle of its caller:

    expect(key, deadline)        a wish: bring it if there is time
    need(key, deadline, now)     HIT: it is there and held; COMING: wait; MISSING: compute it
    start(now)                   descriptors and jobs to carry out now; call it after any of these
    landed(descriptor, now)      its bytes have crossed (or not); decoding may follow
    worked(job, now)             a lane has finished
    use(key, now)                computation has read the block: it may be evicted again
    waited(key, begin, end)      computation stood still for it: exposed time, booked to its cause

A block stays where it came from; the copy in the target is one more. So evicting it is free, unless
it is the only copy: then it is written to a lower tier, or dropped, by cost. What comes from far
and is likely to be used again gets a copy in a nearer tier on the way.
"""

from collections import Counter
from enum import Enum
from typing import Final

from msgspec import Struct

from penstock.core.events import MoveClass
from penstock.core.types import NS_PER_S
from penstock.kv.compression import CompressionEngine, Job
from penstock.kv.dma import DESCRIPTOR_BYTES_MAX, Descriptor, DmaScheduler, Transfer
from penstock.kv.eviction import make_order
from penstock.kv.flights import Flight, Flights, Places
from penstock.kv.policy import Option, Temperature, choose_tier, temperature_of
from penstock.kv.prefetch import PrefetchQueue
from penstock.kv.residency import Copy, Residency
from penstock.kv.reuse import ReuseHistory
from penstock.kv.tiers import RAW, BlockKey, CodecSpec, LinkSpec, Tier, TierSpec

TIERS: Final = tuple(Tier)


class OrchestratorConfig(Struct, frozen=True, kw_only=True):
    """A memory hierarchy and how to use it. `codecs` includes RAW, whose size is a whole block's.

    `cache_tiers` are those that get a copy of what came from further away and will be used again.
    """

    tiers: tuple[TierSpec, ...]
    links: tuple[LinkSpec, ...]
    codecs: tuple[CodecSpec, ...]
    target: Tier
    cache_tiers: tuple[Tier, ...] = ()
    eviction: str = "lru"
    num_lanes: int = 1
    recompute_ns: int = NS_PER_S
    """Predicted time to compute one block anew."""
    prefetch_depth: int = 256
    prefetch_horizon_ns: int = NS_PER_S
    descriptor_bytes_max: int = DESCRIPTOR_BYTES_MAX


class Outcome(Enum):
    """What became of a need."""

    HIT = "hit"
    COMING = "coming"
    MISSING = "missing"


class Orchestrator:
    """Where blocks are and which go where next."""

    def __init__(self, config: OrchestratorConfig, places: Places) -> None:
        self.config = config
        self.residency = Residency(config.tiers)
        least_bytes = min(codec.block_bytes for codec in config.codecs)
        self.history = ReuseHistory(sum(t.capacity_bytes for t in config.tiers) // least_bytes)
        self.dma = DmaScheduler(config.links, descriptor_bytes_max=config.descriptor_bytes_max)
        self.compression = CompressionEngine(config.num_lanes)
        self.prefetch = PrefetchQueue(
            depth=config.prefetch_depth, horizon_ns=config.prefetch_horizon_ns
        )
        self.num_needs = dict.fromkeys(Outcome, 0)
        self.num_evicted = {spec.tier: 0 for spec in config.tiers}
        self._codecs: dict[str, CodecSpec] = {codec.name: codec for codec in config.codecs}
        self._links = {link.ends: link for link in config.links}
        self._orders = {spec.tier: make_order(config.eviction) for spec in config.tiers}
        self._flights = Flights(
            target=config.target,
            codecs=self._codecs,
            residency=self.residency,
            dma=self.dma,
            compression=self.compression,
            orders=self._orders,
            places=places,
        )
        self._needed: Counter[BlockKey] = Counter()
        self._stalled: dict[BlockKey, int] = {}
        self._came: dict[BlockKey, Flight] = {}
        """By which flight each block in the target came."""

    # ------------------------------------------------------------------------------ computation

    def store(self, key: BlockKey, tier: Tier, codec: str) -> bool:
        """Note a block that was written to a tier; False when there is no room for it."""
        self.history.meet(key)
        return self._flights.store(key, tier, codec, self._worth(key, tier))

    def need(self, key: BlockKey, deadline_ns: int, now_ns: int) -> Outcome:
        """Ask for a block in the target by `deadline_ns`; hold it there until `use`.

        MISSING: it is nowhere, and nothing is held.
        """
        outcome = self._find(key, deadline_ns, now_ns)
        self.num_needs[outcome] += 1
        self.prefetch.need(key)
        if outcome is not Outcome.MISSING:
            self._needed[key] += 1
        return outcome

    def _find(self, key: BlockKey, deadline_ns: int, now_ns: int) -> Outcome:
        if self.is_ready(key):
            return Outcome.HIT
        flight = self._flights.find(key, self.config.target)
        if flight is not None:
            self.dma.promote(flight.transfer, MoveClass.ONBOARD, deadline_ns)
            return Outcome.COMING
        if not self.residency.present(key):
            return Outcome.MISSING
        if self._bring(key, MoveClass.ONBOARD, deadline_ns, now_ns):
            # An earlier need may have waited for room.
            self._stalled.pop(key, None)
        else:
            self._stalled[key] = min(deadline_ns, self._stalled.get(key, deadline_ns))
        return Outcome.COMING

    def expect(self, key: BlockKey, deadline_ns: int) -> None:
        """Wish for a block in the target by `deadline_ns`, if nobody has it there yet."""
        if not self.is_ready(key):
            self.prefetch.expect(key, deadline_ns)

    def withdraw(self, key: BlockKey) -> None:
        """Take a wish back; what has not begun to move does not."""
        self.prefetch.lose(key)
        flight = self._flights.find(key, self.config.target)
        if flight and not self._needed[key]:
            self._flights.cancel(flight)

    def is_ready(self, key: BlockKey) -> bool:
        """Tell whether computation can read the block now."""
        return self.residency.is_present(key, self.config.target)

    def use(self, key: BlockKey, now_ns: int) -> None:
        """Note that computation has read a block it needed."""
        assert self._needed[key] > 0, f"{key!r} was not needed"
        assert self.is_ready(key), f"{key!r} was read before it was there"
        self._needed[key] -= 1
        if not self._needed[key]:
            del self._needed[key]
        self.residency.touch(key, now_ns)
        self.history.use(key)
        for tier, order in self._orders.items():
            if self.residency.is_present(key, tier):
                order.touch(key)
        self._cache_nearer(key, now_ns)

    def waited(self, key: BlockKey, begin_ns: int, end_ns: int) -> None:
        """Book exposed time: until the bytes had crossed to the link, the rest to decoding."""
        flight = self._came[key]
        crossing_ns = end_ns - begin_ns
        if flight.codec.decode_ns and flight.landed_ns is not None:
            crossing_ns = min(crossing_ns, max(0, flight.landed_ns - begin_ns))
        self.dma.expose(flight.transfer.link, crossing_ns)
        self.compression.books.expose(end_ns - begin_ns - crossing_ns)

    # ------------------------------------------------------------------------------ movement

    def start(self, now_ns: int) -> tuple[list[Descriptor], list[Job]]:
        """Return what is to be carried out from now on."""
        for key, deadline_ns in list(self._stalled.items()):
            if self._bring(key, MoveClass.ONBOARD, deadline_ns, now_ns):
                del self._stalled[key]
        if not self._stalled:
            self._start_prefetches(now_ns)
        return self.dma.start(now_ns), self.compression.start(now_ns)

    def landed(
        self, descriptor: Descriptor, now_ns: int, *, is_failed: bool = False
    ) -> list[BlockKey]:
        """Note that a descriptor's bytes have crossed, or did not.

        Returns the needed blocks that nobody can bring any more: compute them.
        """
        arrived, failed = self._flights.landed(descriptor, now_ns, is_failed=is_failed)
        for flight in arrived:
            self._arrive(flight)
        return [flight.key for flight in failed if self._is_lost(flight)]

    def worked(self, job: Job, now_ns: int) -> None:
        """Note that a lane has finished a block: decoded it is there, encoded it may cross."""
        flight = self._flights.worked(job, now_ns)
        if flight is not None:
            self._arrive(flight)

    def _start_prefetches(self, now_ns: int) -> None:
        while (wish := self.prefetch.take(now_ns)) is not None:
            key, deadline_ns = wish
            if self._flights.find(key, self.config.target) is not None:
                continue
            if self.is_ready(key):
                self.prefetch.arrive(key)
            elif not self.residency.present(key):
                self.prefetch.lose(key)
            elif not self._bring(key, MoveClass.PREFETCH, deadline_ns, now_ns):
                self.prefetch.put_back(key)
                return

    def _bring(self, key: BlockKey, kind: MoveClass, deadline_ns: int, now_ns: int) -> bool:
        """Start towards the target from the copy that is there soonest; False without room."""
        target = self.config.target
        copies = [c for c in self.residency.present(key) if (c.tier, target) in self._links]
        assert copies, f"{key!r} has no copy that is linked to {target}"
        if not self._make_room(target, self._codecs[RAW].block_bytes, now_ns):
            return False
        copy = min(copies, key=lambda c: self._fetch_ns(key, c, kind))
        self._came[key] = self._flights.send(key, copy, target, kind, deadline_ns)
        return True

    def _arrive(self, flight: Flight) -> None:
        self._flights.arrive(flight, self._worth(flight.key, flight.destination))
        if flight.destination is self.config.target:
            self.prefetch.arrive(flight.key)

    def _is_lost(self, flight: Flight) -> bool:
        """Give up a source that could not be read; True when a needed block has no other."""
        key, source = flight.key, flight.source
        if flight.destination is not self.config.target:
            return False
        copy = self.residency.copy(key, source)
        if copy is not None and not copy.num_holds:
            self._flights.drop(key, source)
        self.prefetch.lose(key)
        if not self._needed[key]:
            return False
        if self.residency.present(key):
            self._stalled[key] = flight.transfer.deadline_ns
            return False
        del self._needed[key]
        return True

    # ------------------------------------------------------------------------------ room

    def _make_room(self, tier: Tier, num_bytes: int, now_ns: int, *, may_sink: bool = True) -> bool:
        """Evict until `num_bytes` fit; False while what must be written below has not been."""
        order = self._orders[tier]
        while self.residency.free_bytes(tier) < num_bytes:
            victim = order.victim(lambda key: self._can_evict(key, tier))
            if victim is None:
                return False
            is_only = len(self.residency.present(victim)) == 1
            if is_only and (not may_sink or self._sink(victim, tier, now_ns)):
                return False
            self._flights.drop(victim, tier, is_evicted=True)
            self.num_evicted[tier] += 1
            if tier is self.config.target:
                self._came.pop(victim, None)
                self.prefetch.lose(victim)
        return True

    def _can_evict(self, key: BlockKey, tier: Tier) -> bool:
        # What waits for room in the target still has to be read from where it is.
        if key in self._stalled or (tier is self.config.target and key in self._needed):
            return False
        copy = self.residency.copy(key, tier)
        return copy is not None and copy.is_present and not copy.num_holds

    def _sink(self, key: BlockKey, tier: Tier, now_ns: int) -> bool:
        """Write an only copy to a lower tier if that pays; True when it is on its way."""
        copy = self.residency.copy(key, tier)
        assert copy is not None, f"{key!r} is not in {tier}"
        options = [
            Option(
                below,
                self._links[below, self.config.target].duration_ns(copy.num_bytes),
                self.dma.ahead_ns((tier, below), MoveClass.OFFLOAD),
                self.residency.free_bytes(below),
            )
            for below in TIERS[TIERS.index(tier) + 1 :]
            if (tier, below) in self._links and (below, self.config.target) in self._links
        ]
        place = choose_tier(
            options,
            recompute_ns=self.config.recompute_ns,
            expected_uses=self.history.chance(key),
            num_bytes=copy.num_bytes,
        )
        if place is None:
            return False
        deadline_ns = now_ns + self.config.prefetch_horizon_ns
        self._flights.send(key, copy, place, MoveClass.OFFLOAD, deadline_ns)
        return True

    def _cache_nearer(self, key: BlockKey, now_ns: int) -> None:
        """Write what came from far and will be used again into the nearest tier meant for that."""
        target, flight = self.config.target, self._came.get(key)
        for tier in self.config.cache_tiers:
            if flight is None or self.residency.copy(key, tier) is not None:
                return
            codec = flight.codec
            far = self._links[flight.source, target].duration_ns(codec.block_bytes)
            near = self._links[tier, target].duration_ns(codec.block_bytes)
            write_ns = self._links[target, tier].duration_ns(codec.block_bytes) + codec.encode_ns
            chance = self.history.chance(key)
            warmth = temperature_of(chance, save_ns=far - near, write_ns=write_ns)
            copy = self.residency.copy(key, target)
            if warmth is not Temperature.HOT or copy is None:
                return
            # Not at the price of writing another block's only copy elsewhere first.
            if self._make_room(tier, codec.block_bytes, now_ns, may_sink=False):
                deadline_ns = now_ns + self.config.prefetch_horizon_ns
                self._flights.send_as(key, copy, tier, codec, MoveClass.OFFLOAD, deadline_ns)

    # ------------------------------------------------------------------------------ costs

    def _fetch_ns(self, key: BlockKey, copy: Copy, kind: MoveClass) -> float:
        """Predict how long a copy takes into the target, behind what is before it."""
        link = copy.tier, self.config.target
        transfer = Transfer(key, kind, link, copy.num_bytes, 0, copy.address)
        fetch_ns = self.dma.predict_ns(transfer)
        if copy.decode_ns:
            fetch_ns += copy.decode_ns + self.compression.ahead_ns()
        return fetch_ns

    def _worth(self, key: BlockKey, tier: Tier) -> float:
        """Return what a hit in this tier saves: reading the next best copy, or computing."""
        target = self.config.target
        costs = [
            self._links[copy.tier, target].duration_ns(copy.num_bytes)
            for copy in self.residency.present(key)
            if copy.tier is not tier and (copy.tier, target) in self._links
        ]
        return float(min(costs, default=self.config.recompute_ns))

    def check(self) -> None:
        """Assert that the parts agree: bytes, flights, queues."""
        self.residency.check()
        self.dma.check()
        self._flights.check()
