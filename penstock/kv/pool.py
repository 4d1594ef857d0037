"""All blocks of one group of one worker: free, held how often, or cached for prefix hits.

Brings the segment allocator and the prefix cache together under reference counts;
`core.block.BlockState` names the states. It knows neither requests nor tokens: `kv/cache.py` and
`kv/group.py`, its only callers, do.

state    held by     in the allocator     named
FREE     nobody      yes                  no
ACTIVE   somebody    no                   once it is full
CACHED   nobody      no (kept), yes (spare): see `kv/prefix_cache.py`
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.core.block import BlockState
from penstock.core.types import NO_DIGEST, BlockHash, BlockId, Digest
from penstock.kv.allocator import SegmentAllocator
from penstock.kv.prefix_cache import PrefixCache

Generations = npt.NDArray[np.int64]
"""How often each block was handed out, [num_blocks] int64; peers may read it while it grows."""

SPARE_SHARE: Final = 0.2
SPARE_TIMES_WANTED: Final = 3
"""When free blocks run short, cached ones become spare until this share of the pool, and this many
times what is wanted, may be written: the more there is to choose from, the longer the runs.

Measured with prompts of 36 blocks (mean, lognormal) in a full pool of 512 or 4096 blocks, 7 in 10
sharing a prefix: 1.2 runs a prompt instead of 22 without spare blocks, at 2 to 6% fewer hits.
"""


class Relocation(NamedTuple):
    """A cached block and where in the same pool its content is to be."""

    source: BlockId
    destination: BlockId


class BlockPool:
    """Reference-counted blocks: each free, active (held) or cached (named, held by nobody).

    `generations` is where to count how often each block is handed out: memory that peers can read,
    if they are to notice that a block is not any more what they were offered.
    """

    def __init__(self, num_blocks: int, generations: Generations | None = None) -> None:
        self.num_blocks = num_blocks
        self.allocator = SegmentAllocator(num_blocks)
        self.prefix_cache = PrefixCache()
        self._num_holders = [0] * num_blocks
        self._generations = np.zeros(num_blocks, np.int64) if generations is None else generations
        self._relocating: dict[BlockId, BlockId] = {}  # destination -> source
        self._digests = [NO_DIGEST] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return self.allocator.num_free - self.prefix_cache.num_spare

    @property
    def num_cached(self) -> int:
        """Blocks there for prefix hits alone; given up when room is needed."""
        return self.prefix_cache.num_kept + self.prefix_cache.num_spare

    @property
    def num_active(self) -> int:
        """Blocks that somebody holds, or that a relocation writes."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give, free or cached; not those that a relocation reads."""
        kept = self.prefix_cache.num_kept - self.prefix_cache.num_pinned
        return self.allocator.num_free + kept

    @property
    def relocating(self) -> Collection[BlockId]:
        """Blocks that a relocation writes."""
        return self._relocating.keys()

    def state(self, block_id: BlockId) -> BlockState:
        """Return the state of a block."""
        if self._num_holders[block_id] or block_id in self._relocating:
            return BlockState.ACTIVE
        return BlockState.CACHED if self.prefix_cache.is_idle(block_id) else BlockState.FREE

    def num_holders(self, block_id: BlockId) -> int:
        """Return how many hold the block."""
        return self._num_holders[block_id]

    @property
    def holders(self) -> Sequence[int]:
        """How many hold each block."""
        return self._num_holders

    def generations(self, block_ids: Sequence[BlockId]) -> tuple[int, ...]:
        """Return how often each block was handed out; an older number means other contents."""
        return tuple(self._generations[list(block_ids)].tolist())

    def digest(self, block_id: BlockId) -> Digest:
        """Return the digest of the block's content, or `NO_DIGEST`."""
        return self._digests[block_id]

    def note_digest(self, block_id: BlockId, digest: Digest) -> None:
        """Remember the digest of a block whose content is complete, until it is handed out anew."""
        self._digests[block_id] = digest

    def allocate(self, count: int, *, after: BlockId | None = None) -> list[BlockId] | None:
        """Hold `count` new blocks, right behind `after` if possible; None changes nothing."""
        if not self._make_room(count):
            return None
        if after is None:
            return self._hold_new(self.allocator.allocate(count))
        return self._hold_new(self.allocator.extend(after, count))

    def allocate_like(self, runs: Sequence[int]) -> list[BlockId] | None:
        """Hold `sum(runs)` new blocks whose runs follow a peer's; None changes nothing."""
        if not self._make_room(sum(runs)):
            return None
        return self._hold_new(self.allocator.allocate_like(runs))

    def hold(self, block_ids: Iterable[BlockId]) -> None:
        """Hold blocks that are active or cached once more."""
        spare = []
        for block_id in block_ids:
            if not self._num_holders[block_id]:
                if self.prefix_cache.is_spare(block_id):
                    spare.append(block_id)
                self.prefix_cache.unpark(block_id)
            self._num_holders[block_id] += 1
        self.allocator.take(spare)

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Let go of blocks given in the order of a block table.

        The last one goes first, so that in the order of eviction a block never comes before those
        that follow it.
        """
        freed = []
        for block_id in reversed(block_ids):
            holders = self._num_holders[block_id] - 1
            assert holders >= 0, f"block {block_id} is held by nobody"
            self._num_holders[block_id] = holders
            if holders:
                continue
            if self.prefix_cache.is_indexed(block_id):
                self.prefix_cache.park(block_id)
            else:
                freed.append(block_id)
        self.allocator.free(freed)

    def insert(self, block_id: BlockId, block_hash: BlockHash) -> None:
        """Name a full block that is held; a name that is taken stays with its block."""
        assert self._num_holders[block_id], f"block {block_id} is named but held by nobody"
        self.prefix_cache.insert(block_id, block_hash)

    # --- moving cached blocks within the pool: see `kv/defragment.py`

    def can_relocate(self, block_id: BlockId) -> bool:
        """Tell whether the block is cached for hits alone, to be kept, and not being copied."""
        return self.prefix_cache.is_kept(block_id) and not self.prefix_cache.is_pinned(block_id)

    def begin_relocation(self, relocations: Sequence[Relocation]) -> None:
        """Pin the sources and take the destinations, which may be written; then copy the bytes.

        Until it ends a source can be found and held, but is not given up; a destination is neither
        free nor held. What is written there are other contents: a new generation.
        """
        destinations = sorted(r.destination for r in relocations)
        self.allocator.take(destinations)
        self.prefix_cache.forget(destinations)
        self.prefix_cache.pin(r.source for r in relocations)
        for source, destination in relocations:
            self._relocating[destination] = source
            self._generations[destination] += 1
            self._digests[destination] = NO_DIGEST

    def end_relocation(self, relocations: Sequence[Relocation]) -> int:
        """Give name, digest and recency to the copies and free the sources; return how many.

        A source that somebody has taken up meanwhile stays where it is, and its copy is free.
        """
        freed, num_moved = [], 0
        for relocation in relocations:
            source, destination = relocation
            self._forget_relocation(relocation)
            if self.prefix_cache.is_kept(source):
                self.prefix_cache.rename(source, destination)
                self._digests[destination] = self._digests[source]
                freed.append(source)
                num_moved += 1
            else:
                freed.append(destination)
        self.allocator.free(freed)
        return num_moved

    def abort_relocation(self, relocations: Sequence[Relocation]) -> None:
        """Leave the sources where they are and free the destinations: the copy has failed."""
        for relocation in relocations:
            self._forget_relocation(relocation)
        self.allocator.free(r.destination for r in relocations)

    def _forget_relocation(self, relocation: Relocation) -> None:
        source = self._relocating.pop(relocation.destination)
        assert source == relocation.source, (relocation, source)
        self.prefix_cache.unpin(source)

    def check(self) -> None:
        """Assert that every block is in exactly one state, and that only active ones are held."""
        self.allocator.check()
        self.prefix_cache.check()
        segments = self.allocator.segments()
        writable = {BlockId(b) for start, n in segments for b in range(start, start + n)}
        cached, spare = self.prefix_cache.idle(), self.prefix_cache.spare()
        active = {BlockId(b) for b, num_holders in enumerate(self._num_holders) if num_holders}
        free = writable - spare
        assert min(self._num_holders) >= 0, self._num_holders
        assert cached & writable == spare, (cached, writable, spare)
        assert not (writable | cached) & active, (writable | cached) & active
        arriving = self._relocating.keys()
        assert not arriving & (writable | cached | active), arriving
        assert all(map(self.prefix_cache.is_pinned, self._relocating.values())), self._relocating
        num_known = len(free) + len(cached) + len(active) + len(arriving)
        assert num_known == self.num_blocks, (free, cached, active, arriving)
        assert (self.num_free, self.num_cached) == (len(free), len(cached))
        assert not any(map(self.prefix_cache.is_indexed, free))

    def _make_room(self, count: int) -> bool:
        if count > self.num_available:
            return False
        wanted = max(SPARE_TIMES_WANTED * count, int(SPARE_SHARE * self.num_blocks))
        if wanted > self.allocator.num_free:
            num_free = self.allocator.num_free
            given_up = self.prefix_cache.give_up(wanted - num_free, max(0, count - num_free))
            self.allocator.free(given_up)
        return True

    def _hold_new(self, block_ids: list[BlockId] | None) -> list[BlockId]:
        assert block_ids is not None, "no blocks although room was made"
        self.prefix_cache.forget(block_ids)
        for block_id in block_ids:
            assert not self._num_holders[block_id], f"block {block_id} was handed out while held"
            self._num_holders[block_id] = 1
            self._digests[block_id] = NO_DIGEST
        # Before anything is written there: who reads the old content finds the new number after it.
        self._generations[block_ids] += 1
        return block_ids
