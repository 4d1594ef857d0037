"""A simulated memory machine that carries out what the KV orchestrator decides, with every cost.

The orchestrator is the production one (`penstock/kv/`); here are only time and bytes. Called by
`penstock sim memory`, through `penstock/sim/memory_study.py`.

The accounting:
* Computation runs in the order of the accesses, `compute_ns` each; an access begins when the one
  before is done and its block, raw, is in the staging memory. All waiting is *exposed* time. So
  total = computation + exposed, with nothing hidden in a max over a step.
* Everything computation reads comes through staging: after a block has arrived there it is stored
  (`stage_ns`) and read (`read_ns`) before it can be used. A block that is in staging is a hit: no
  tier below is read, in bytes or in time.
* A transfer takes its descriptor's latency once and then its bytes. `num_queues` descriptors of a
  link may be under way: latencies overlap, bytes do not. Reading and writing a tier share its
  bandwidth, whichever link they use. Every transfer counts, in bytes and in time, when it is
  started, also a prefetch that nobody uses and one that a later eviction makes vain.
* A lane decodes one block at a time. Waiting for it is exposed time too, booked apart.
* Room is taken when a block starts to arrive. In staging it is that of the raw block. A block's
  encoded bytes are not counted there beside it while it is decoded: a few blocks at a time.
* What a unit (a step, or a layer of one) reads is known when it begins. With `lookahead_units` 1
  the hints of the next unit are wished for then: the truth in KVFlow's workload, as its prefetcher
  assumes; a guess elsewhere, and what was guessed wrongly is read and charged all the same.
* Blocks are where the study puts them at the start, as in KVFlow; reading them is charged, having
  put them there is not (prefill writes them either way, raw or encoded).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil
from typing import Final

from penstock.kv.compression import Direction, Job
from penstock.kv.dma import Descriptor
from penstock.kv.orchestrator import Orchestrator, Outcome
from penstock.kv.prefetch import PrefetchBooks
from penstock.kv.tiers import BlockKey, Tier

REGION_BYTES: Final = 1 << 48
"""Blocks of every encoded size lie in a region of their own, so that neighbours stay neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What is not a link's: computing with one block, storing one in staging, reading it there."""

    compute_ns: int
    stage_ns: int = 0
    read_ns: int = 0
    lookahead_units: int = 1


@dataclass(slots=True)
class MemoryFigures:
    """What a run cost. Bytes by the tier that was read or written; times in ns."""

    num_accesses: int = 0
    num_hits: int = 0
    num_recomputed: int = 0
    total_ns: int = 0
    compute_ns: int = 0
    recompute_ns: int = 0
    exposed_transfer_ns: int = 0
    exposed_decode_ns: int = 0
    read_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    write_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_descriptors: int = 0
    num_transfers: int = 0
    num_decoded: int = 0
    decoder_busy_ns: int = 0
    link_busy_ns: dict[str, int] = field(default_factory=dict)
    prefetch: PrefetchBooks = field(default_factory=PrefetchBooks)

    @property
    def exposed_ns(self) -> int:
        """All time that computation stood still for blocks, decoding included."""
        return self.exposed_transfer_ns + self.exposed_decode_ns

    @property
    def hbm_bytes(self) -> int:
        """Bytes read from HBM."""
        return self.read_bytes[Tier.HBM]


class LinearPlaces:
    """Every block has its own address in every tier and size: by its number, `key`."""

    def place(self, key: BlockKey, tier: Tier, num_bytes: int) -> int:
        """Return the address; neighbours in number are neighbours in memory."""
        assert isinstance(key, int), f"{key!r} is not a number"
        return num_bytes * REGION_BYTES + key * num_bytes

    def vacate(self, tier: Tier, address: int, num_bytes: int) -> None:
        """Forget nothing: the address stays the block's own."""


class MemoryMachine:
    """Simulated links, lanes and computation around one orchestrator."""

    def __init__(self, orchestrator: Orchestrator, timing: Timing) -> None:
        self.figures = MemoryFigures()
        self.now_ns = 0
        self._orchestrator = orchestrator
        self._timing = timing
        self._events: list[tuple[int, int, Descriptor | Job]] = []
        self._num_events = 0
        self._free_at_ns: dict[Tier, float] = dict.fromkeys(Tier, 0.0)
        self._ready_ns: dict[BlockKey, int] = {}

    def run(
        self, units: Sequence[Sequence[BlockKey]], hints: Sequence[Sequence[BlockKey]]
    ) -> MemoryFigures:
        """Compute all units; return the figures. `hints[i]` is the guess of `units[i]`."""
        for index, unit in enumerate(units):
            ahead = hints[index + 1 : index + 1 + self._timing.lookahead_units]
            self._run_unit(unit, ahead)
            if self._timing.lookahead_units:
                needed = set(unit)
                for key in hints[index]:
                    if key not in needed:
                        self._orchestrator.withdraw(key)
        self._close_books()
        return self.figures

    def _run_unit(self, unit: Sequence[BlockKey], ahead: Sequence[Sequence[BlockKey]]) -> None:
        orchestrator, compute_ns = self._orchestrator, self._timing.compute_ns
        outcomes = []
        for offset, key in enumerate(unit):
            deadline_ns = self.now_ns + offset * compute_ns
            outcomes.append(orchestrator.need(key, deadline_ns, self.now_ns))
        offset = len(unit)
        for keys in ahead:
            for key in keys:
                orchestrator.expect(key, self.now_ns + offset * compute_ns)
                offset += 1
        self._start()
        for key, outcome in zip(unit, outcomes, strict=True):
            self._access(key, outcome)

    def _access(self, key: BlockKey, outcome: Outcome) -> None:
        figures = self.figures
        figures.num_accesses += 1
        if outcome is Outcome.MISSING:
            recompute_ns = self._orchestrator.config.recompute_ns
            figures.num_recomputed += 1
            figures.recompute_ns += recompute_ns
            self._advance(self.now_ns + recompute_ns)
            self._compute()
            return
        figures.num_hits += outcome is Outcome.HIT
        begin_ns = self.now_ns
        while not self._orchestrator.is_ready(key):
            assert self._events, f"block {key!r} is waited for and nothing is under way"
            self._advance(self._events[0][0])
        usable_ns = self._ready_ns.get(key, 0) + self._timing.stage_ns + self._timing.read_ns
        self._advance(max(self.now_ns, usable_ns))
        if self.now_ns > begin_ns:
            self._orchestrator.waited(key, begin_ns, self.now_ns)
        self._compute()
        self._orchestrator.use(key, self.now_ns)
        self._start()

    def _compute(self) -> None:
        self.figures.compute_ns += self._timing.compute_ns
        self._advance(self.now_ns + self._timing.compute_ns)

    def _advance(self, until_ns: int) -> None:
        """Let happen what ends until then, in order."""
        while self._events and self._events[0][0] <= until_ns:
            self.now_ns, _, event = heappop(self._events)
            if isinstance(event, Job):
                self._orchestrator.worked(event, self.now_ns)
                if event.direction is Direction.DECODE:
                    self._ready_ns[event.key] = self.now_ns
            else:
                self._orchestrator.landed(event, self.now_ns)
                for transfer in event.transfers:
                    self._ready_ns[transfer.key] = self.now_ns
            self._start()
        self.now_ns = until_ns

    def _start(self) -> None:
        descriptors, jobs = self._orchestrator.start(self.now_ns)
        for descriptor in descriptors:
            self._push(self._cross(descriptor), descriptor)
        for job in jobs:
            self._push(self.now_ns + job.duration_ns, job)

    def _cross(self, descriptor: Descriptor) -> int:
        """Occupy the tiers at both ends; return when the last byte has crossed."""
        link, num_bytes = descriptor.link, descriptor.num_bytes
        tiers = [tier for tier in link.ends if tier is not Tier.STAGING]
        begin_ns = max([self.now_ns + link.latency_ns, *(self._free_at_ns[t] for t in tiers)])
        end_ns = begin_ns + link.bytes_ns(num_bytes)
        for tier in tiers:
            self._free_at_ns[tier] = end_ns
        self.figures.read_bytes[link.source] += num_bytes
        self.figures.write_bytes[link.destination] += num_bytes
        return ceil(end_ns)

    def _push(self, at_ns: int, event: Descriptor | Job) -> None:
        self._num_events += 1
        heappush(self._events, (at_ns, self._num_events, event))

    def _close_books(self) -> None:
        figures, orchestrator = self.figures, self._orchestrator
        figures.total_ns = self.now_ns
        for link in orchestrator.dma.links:
            books = orchestrator.dma.books(link.ends)
            figures.exposed_transfer_ns += books.exposed_ns
            figures.num_descriptors += books.num_descriptors
            figures.num_transfers += books.num_transfers
            name = f"{link.source.value}->{link.destination.value}"
            figures.link_busy_ns[name] = books.busy_ns
        codecs = orchestrator.compression.books
        figures.exposed_decode_ns = codecs.exposed_ns
        figures.num_decoded = codecs.num_done[Direction.DECODE]
        figures.decoder_busy_ns = sum(codecs.busy_ns.values())
        figures.prefetch = orchestrator.prefetch.books
        spent = figures.compute_ns + figures.recompute_ns + figures.exposed_ns
        assert spent == figures.total_ns, f"{spent} ns accounted for of {figures.total_ns}"
