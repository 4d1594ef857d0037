"""A trace's churn of KV blocks in a prefill pool and a decode pool, for our allocator and a peer.

Owns the peer (a free list of single blocks with a prefix cache, as most systems have one) and the
course of events: a prompt is prefilled, offered, pulled, decoded and finished, in two pools that
are kept at a given occupancy. It moves no bytes. The requests are those of `churn_jobs.py`;
`spans.py` and `flowkv_transfer.py` beside it use it.
"""

import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from churn_jobs import Job

from penstock.core.block import KVGroup, KVLayout
from penstock.core.types import BlockHash, BlockId, RequestId
from penstock.kv.allocator import run_lengths
from penstock.kv.cache import KVCache
from penstock.kv.defragment import plan_relocation
from penstock.kv.pool import Relocation
from penstock.transfer.plan import cut

PULLED_PER_TICK = 64
"""Blocks that cross while every running sequence decodes one token."""


class Ours:
    """`KVCache`, called in the order in which the scheduler and the decode side call it.

    `moves_per_tick` cached blocks may be moved in the background while a token is decoded, with
    `may_evict` onto spare ones too.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        chunk: int = 2048,
        moves_per_tick: int = 0,
        may_evict: bool = False,
    ) -> None:
        layout = KVLayout("churn", (KVGroup((0,)),), 1, 1, block_size, "bfloat16")
        self.num_blocks = num_blocks
        self.cache = KVCache(layout, [num_blocks])
        self._chunk = chunk
        self._block_size = block_size
        self._moves_per_tick = moves_per_tick
        self._may_evict = may_evict
        self._under_way: list[Relocation] = []
        self.num_moved = self.num_hit = self.num_asked = 0
        """Blocks moved in the background; prompt blocks found, and looked for, in the cache."""

    @property
    def num_active(self) -> int:
        """Blocks that requests hold."""
        return self.cache.groups[0].pool.num_active

    def prefill(self, job: Job) -> tuple[BlockId, ...]:
        """Open, grow by a chunk, reserve the rest."""
        target = job.num_prompt - 1
        cached = self.cache.open(job.request_id, job.hashes, target)
        self.num_hit += cached // self._block_size
        self.num_asked += target // self._block_size
        is_room = self.cache.grow(job.request_id, min(target, cached + self._chunk))
        is_room = is_room and self.cache.reserve(job.request_id, target)
        assert is_room, f"no room for {job.num_prompt} tokens below the cap"
        return self.cache.offer(job.request_id, target)[0].block_ids

    def adopt(self, job: Job, source_ids: tuple[BlockId, ...]) -> tuple[list[int], list[int]]:
        """Reserve runs like the offer's."""
        runs = [run_lengths(source_ids)]
        adoption = self.cache.adopt(job.request_id, job.hashes, job.num_prompt - 1, runs)
        assert adoption is not None, f"no room for {job.num_prompt} tokens below the cap"
        destination_of = adoption.groups[0].destination_of
        return [source_ids[entry] for entry in destination_of], list(destination_of.values())

    def computed(self, job: Job, num_tokens: int) -> None:
        """Name full blocks."""
        self.cache.advance(job.request_id, num_tokens, job.hashes)

    def grow(self, job: Job, num_tokens: int) -> bool:
        """Grow, behind the last block where that is free."""
        return self.cache.grow(job.request_id, num_tokens)

    def tick(self) -> None:
        """End the moves of the last tick, begin those of the next."""
        if not self._moves_per_tick:
            return
        pool = self.cache.groups[0].pool
        self.num_moved += pool.end_relocation(self._under_way)
        self._under_way = plan_relocation(
            pool, self._moves_per_tick, wanted=self.num_blocks // 4, may_evict=self._may_evict
        )
        pool.begin_relocation(self._under_way)

    def writable(self) -> tuple[int, float]:
        """Return the longest run that may be written, and the share of the others."""
        allocator = self.cache.groups[0].pool.allocator
        return allocator.largest_free, allocator.external_fragmentation

    def close(self, job: Job) -> None:
        """Let go."""
        self.cache.close(job.request_id)

    def held(self) -> npt.NDArray[np.bool_]:
        """Return which blocks somebody holds."""
        pool = self.cache.groups[0].pool
        return np.array([pool.num_holders(BlockId(b)) > 0 for b in range(self.num_blocks)])


class FreeList:
    """The peer: single blocks off one list, found again by name until they are handed out anew.

    `is_fifo` takes the block that has been free longest, which is also how a prefix cache evicts
    its oldest (vLLM's free queue); else the one freed last (a stack).
    """

    def __init__(self, num_blocks: int, block_size: int, *, is_fifo: bool) -> None:
        self.num_blocks = num_blocks
        self._size = block_size
        self._is_fifo = is_fifo
        ids = range(num_blocks) if is_fifo else reversed(range(num_blocks))
        self._free = OrderedDict[BlockId, None].fromkeys(map(BlockId, ids))
        self._holders = [0] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._name_of: dict[BlockId, BlockHash] = {}
        self._tables: dict[RequestId, list[BlockId]] = {}

    @property
    def num_active(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - len(self._free)

    def prefill(self, job: Job) -> tuple[BlockId, ...]:
        """Hold the longest cached prefix and take one block after the other for the rest."""
        target = job.num_prompt - 1
        table: list[BlockId] = []
        for name in job.hashes[: target // self._size]:
            if name not in self._block_of:
                break
            table.append(self._block_of[name])
        self._hold(table)
        table += self._take(-(-target // self._size) - len(table))
        self._tables[job.request_id] = table
        return tuple(table)

    def adopt(self, job: Job, source_ids: tuple[BlockId, ...]) -> tuple[list[int], list[int]]:
        """Hold what is here by name and take a block for each that is not."""
        names = job.hashes[: (job.num_prompt - 1) // self._size]
        hits = {i: self._block_of[n] for i, n in enumerate(names) if n in self._block_of}
        self._hold(list(hits.values()))
        missing = [i for i in range(len(source_ids)) if i not in hits]
        taken = self._take(len(missing))
        block_of = {**hits, **dict(zip(missing, taken, strict=True))}
        self._tables[job.request_id] = [block_of[i] for i in range(len(source_ids))]
        return [source_ids[i] for i in missing], list(taken)

    def computed(self, job: Job, num_tokens: int) -> None:
        """Name full blocks."""
        table = self._tables[job.request_id]
        for index in range(num_tokens // self._size - 1, -1, -1):
            if table[index] in self._name_of:
                break
            if job.hashes[index] not in self._block_of:
                self._block_of[job.hashes[index]] = table[index]
                self._name_of[table[index]] = job.hashes[index]

    def grow(self, job: Job, num_tokens: int) -> bool:
        """Take single blocks."""
        table = self._tables[job.request_id]
        missing = -(-num_tokens // self._size) - len(table)
        if missing > len(self._free):
            return False
        table += self._take(max(0, missing))
        return True

    def close(self, job: Job) -> None:
        """Let go, last block first, so that a prefix is given up from its end."""
        for block_id in reversed(self._tables.pop(job.request_id)):
            self._holders[block_id] -= 1
            if not self._holders[block_id]:
                self._free[block_id] = None

    def held(self) -> npt.NDArray[np.bool_]:
        """Return which blocks somebody holds."""
        return np.array(self._holders) > 0

    def _hold(self, block_ids: Sequence[BlockId]) -> None:
        for block_id in block_ids:
            if not self._holders[block_id]:
                del self._free[block_id]
            self._holders[block_id] += 1

    def _take(self, count: int) -> list[BlockId]:
        taken = [self._free.popitem(last=not self._is_fifo)[0] for _ in range(count)]
        for block_id in taken:
            self._holders[block_id] = 1
            name = self._name_of.pop(block_id, None)
            if name is not None:
                del self._block_of[name]
        return taken


@dataclass(slots=True)
class Crossing:
    """A request on its way: offered by the prefill pool, then pulled, then decoding."""

    job: Job
    offered: tuple[BlockId, ...]
    allocate_ns: int
    ticks_left: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class Figures:
    """What one churn showed, per hand-off that had anything to pull, and in samples of the pools.

    `fragmentation` is of all blocks that nobody holds, `largest_free` and `writable_fragmentation`
    of those that may be written without giving up a cached block first. `num_handed_off`,
    `num_moved` and `hit_share` (of prompt blocks) count from the beginning.
    `source_runs` and `destination_runs` are those of the pulled blocks: which side broke a span.
    """

    spans: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    source_runs: list[int] = field(default_factory=list)
    destination_runs: list[int] = field(default_factory=list)
    allocate_us: list[float] = field(default_factory=list)
    fragmentation: list[float] = field(default_factory=list)
    occupancy: list[float] = field(default_factory=list)
    largest_free: list[int] = field(default_factory=list)
    writable_fragmentation: list[float] = field(default_factory=list)
    num_preempted: int = 0
    num_handed_off: int = 0
    num_moved: int = 0
    hit_share: float = 0.0


class Churn:
    """A prefill and a decode pool, both filled with jobs up to `occupancy`, a share of the pool."""

    def __init__(
        self, make: Callable[[], Ours | FreeList], occupancy: float, block_size: int
    ) -> None:
        self.prefill = make()
        self.decode = make()
        self._cap = int(occupancy * self.prefill.num_blocks)
        self._size = block_size
        self._offers: deque[Crossing] = deque()
        self._pulls: list[Crossing] = []
        self._running: list[Crossing] = []
        self._num_handed_off = 0

    def run(self, arrivals: Iterator[Job], count: int) -> Figures:
        """Take `count` hand-offs through both pools, in order of arrival."""
        figures = Figures()
        job = next(arrivals)
        num_done = 0
        while num_done < count:
            while self._has_room(self.prefill, job):
                self._offer(job)
                job = next(arrivals)
            while self._offers and self._has_room(self.decode, self._offers[0].job):
                self._pull(self._offers.popleft(), figures)
                num_done += 1
                if num_done % 50 == 0:
                    self._sample(figures)
            self._tick(figures)
        self._num_handed_off += num_done
        figures.num_handed_off = self._num_handed_off
        if isinstance(self.prefill, Ours) and isinstance(self.decode, Ours):
            figures.num_moved = self.prefill.num_moved + self.decode.num_moved
            figures.hit_share = self.prefill.num_hit / max(1, self.prefill.num_asked)
        return figures

    def blocks_needed(self, job: Job) -> int:
        """Blocks of a prompt without any hit."""
        return -(-job.num_prompt // self._size)

    def _has_room(self, cache: Ours | FreeList, job: Job) -> bool:
        return cache.num_active + self.blocks_needed(job) <= self._cap

    def _offer(self, job: Job) -> None:
        start_ns = time.perf_counter_ns()
        offered = self.prefill.prefill(job)
        self._offers.append(Crossing(job, offered, time.perf_counter_ns() - start_ns))
        self.prefill.computed(job, job.num_prompt - 1)

    def _pull(self, crossing: Crossing, figures: Figures) -> None:
        start_ns = time.perf_counter_ns()
        source, destination = self.decode.adopt(crossing.job, crossing.offered)
        crossing.allocate_ns += time.perf_counter_ns() - start_ns
        crossing.ticks_left = 1 + len(source) // PULLED_PER_TICK
        self._pulls.append(crossing)
        if source:
            spans = len(cut(np.array(source), np.array(destination)))
            figures.spans.append(spans)
            figures.blocks.append(len(source))
            figures.source_runs.append(len(run_lengths(source)))
            figures.destination_runs.append(len(run_lengths(destination)))
            figures.allocate_us.append(crossing.allocate_ns / 1e3)

    def _tick(self, figures: Figures) -> None:
        """Land what has been copied; decode a token of everything that runs."""
        for crossing in self._pulls:
            crossing.ticks_left -= 1
            if not crossing.ticks_left:
                self.prefill.close(crossing.job)
                crossing.num_tokens = crossing.job.num_prompt - 1
                self.decode.computed(crossing.job, crossing.num_tokens)
                self._running.append(crossing)
        self._pulls = [crossing for crossing in self._pulls if crossing.ticks_left]
        self._running = [crossing for crossing in self._running if self._decode(crossing, figures)]
        for cache in (self.prefill, self.decode):
            if isinstance(cache, Ours):
                cache.tick()

    def _decode(self, crossing: Crossing, figures: Figures) -> bool:
        """Compute one token; False when the request is over, or lost its blocks."""
        job = crossing.job
        is_room = True
        if crossing.num_tokens % self._size == 0:
            self.decode.computed(job, crossing.num_tokens)
            is_room = self.decode.grow(job, crossing.num_tokens + 1)
            figures.num_preempted += not is_room
        crossing.num_tokens += 1
        if is_room and crossing.num_tokens < job.num_prompt + job.num_output:
            return True
        self.decode.close(job)
        return False

    def _sample(self, figures: Figures) -> None:
        held = self.decode.held()
        figures.occupancy.append(float(held.mean()))
        edges = np.flatnonzero(np.diff(np.concatenate(([True], held, [True]))))
        runs = edges[1::2] - edges[::2]
        figures.fragmentation.append(1.0 - float(runs.max()) / float(runs.sum()))
        if isinstance(self.decode, Ours):
            largest, share = self.decode.writable()
            figures.largest_free.append(largest)
            figures.writable_fragmentation.append(share)
