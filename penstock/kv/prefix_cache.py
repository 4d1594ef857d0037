"""Which block holds which content, in one group: index by hash, and the order of eviction.

It knows names and the order in which blocks were let go; who holds a block, and how many do, is
`kv/pool.py`'s, which calls it. A block named here is full and never changes until it is
overwritten.

An indexed block that nobody holds is *idle*: first *kept*, then, when those let go before it have
been given up, *spare*. A spare block is a free one that still has its name: it may be overwritten
at any moment, and until then a hit takes it back. So age decides which blocks are spare, and the
allocator is free to choose long runs among them. Giving up only as many blocks as are needed, in
order of age, leaves free blocks scattered: 20 runs for a prompt of 40 blocks instead of one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from penstock.core.types import BlockHash, BlockId
from penstock.kv.retention import Retention


class PrefixCache:
    """Index from hash to block, and the idle blocks: kept, in order of release, or spare."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._kept: OrderedDict[int, BlockId] = OrderedDict()  # place in the order of release
        self._place_of: dict[BlockId, int] = {}
        self._next_place = 0
        self._let_go_ns: dict[BlockId, int] = {}
        self.retention = Retention(0)
        """What is to be kept longer than its age says, and the time."""
        self._spare: set[BlockId] = set()
        self._pinned: set[BlockId] = set()
        self.changes: dict[BlockHash, bool] | None = None
        """Names that came (True) or went since this was last emptied; None while nobody asks."""
        self.parked: list[BlockHash] | None = None
        """Names of blocks let go by all since this was last emptied; None while nobody asks."""

    @property
    def num_indexed(self) -> int:
        """Number of blocks that have a name."""
        return len(self._block_of)

    @property
    def num_kept(self) -> int:
        """Number of idle blocks that may not be overwritten yet."""
        return len(self._kept)

    @property
    def num_spare(self) -> int:
        """Number of idle blocks that may be overwritten."""
        return len(self._spare)

    @property
    def num_pinned(self) -> int:
        """Number of kept blocks that may not be given up now."""
        return sum(block_id in self._place_of for block_id in self._pinned) if self._pinned else 0

    def is_indexed(self, block_id: BlockId) -> bool:
        """Tell whether the block has a name, by which it can be found."""
        return block_id in self._hash_of

    def is_idle(self, block_id: BlockId) -> bool:
        """Tell whether the block is there for hits alone."""
        return block_id in self._place_of or block_id in self._spare

    def is_kept(self, block_id: BlockId) -> bool:
        """Tell whether the block is idle and may not be overwritten."""
        return block_id in self._place_of

    def is_pinned(self, block_id: BlockId) -> bool:
        """Tell whether the block is being copied to another place."""
        return block_id in self._pinned

    def is_spare(self, block_id: BlockId) -> bool:
        """Tell whether the block may be overwritten."""
        return block_id in self._spare

    def idle(self) -> set[BlockId]:
        """Return a copy of all that are there for hits alone."""
        return self._place_of.keys() | self._spare

    def spare(self) -> set[BlockId]:
        """Return a copy of those of them that may be overwritten."""
        return set(self._spare)

    def idle_ns(self, block_id: BlockId) -> int:
        """Return how long ago an idle block was let go."""
        return self.retention.now_ns - self._let_go_ns[block_id]

    def name(self, block_id: BlockId) -> BlockHash | None:
        """Return what the block is called."""
        return self._hash_of.get(block_id)

    def find(self, block_hash: BlockHash) -> BlockId | None:
        """Return the block with this content."""
        return self._block_of.get(block_hash)

    def longest_prefix(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """Return how many of the first `limit` hashes are indexed without a gap."""
        block_of = self._block_of
        for index in range(limit):
            if hashes[index] not in block_of:
                return index
        return limit

    def longest_window(
        self, hashes: Sequence[BlockHash], limit: int, first_needed: Callable[[int], int]
    ) -> int:
        """Return the largest n <= `limit` for which hashes `[first_needed(n), n)` are all indexed.

        `first_needed` must not decrease. O(limit): a gap at i rules out every n that reaches beyond
        it.
        """
        block_of = self._block_of
        length = limit
        while length:
            for index in range(length - 1, first_needed(length) - 1, -1):
                if hashes[index] not in block_of:
                    length = index
                    break
            else:
                return length
        return 0

    def insert(self, block_id: BlockId, block_hash: BlockHash) -> None:
        """Name a full block that somebody holds; a name that is taken stays with its block."""
        if block_hash in self._block_of:
            return
        assert block_id not in self._hash_of, f"block {block_id} has a name already"
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        if self.changes is not None:
            self.changes[block_hash] = True

    def park(self, block_id: BlockId) -> None:
        """Keep a block that nobody holds any more, as the latest of all."""
        assert block_id in self._hash_of, f"block {block_id} has no name to be kept for"
        assert not self.is_idle(block_id), f"block {block_id} is idle already"
        self._kept[self._next_place] = block_id
        self._place_of[block_id] = self._next_place
        self._next_place += 1
        self._let_go_ns[block_id] = self.retention.now_ns
        if self.parked is not None:
            self.parked.append(self._hash_of[block_id])

    def unpark(self, block_id: BlockId) -> None:
        """Note that an idle block is held again."""
        if block_id in self._spare:
            self._spare.remove(block_id)
        else:
            del self._kept[self._place_of.pop(block_id)]
        del self._let_go_ns[block_id]

    def give_up(self, count: int, needed: int = 0) -> list[BlockId]:
        """Make the `count` longest kept blocks spare, or all there are, and return them.

        Blocks are let go last one first, so a prefix is given up from its end and stays useful.
        Those that are pinned stay. Blocks that are to be retained are given up only as far as
        others do not make `needed`.
        """
        if not self.retention.is_empty:
            chosen = self._least_wanted(count, needed)
        else:
            oldest = iter(self._kept.items())
            if self._pinned:
                oldest = filter(lambda entry: entry[1] not in self._pinned, oldest)
            chosen = [place for place, _ in islice(oldest, count)]
        given_up = [self._kept.pop(place) for place in chosen]
        for block_id in given_up:
            del self._place_of[block_id]
        self._spare.update(given_up)
        return given_up

    def _least_wanted(self, count: int, needed: int) -> list[int]:
        """Return places of kept blocks: `count` that nobody wants, or `needed` with others."""
        by_strength: list[list[int]] = [[], [], []]
        for place, block_id in self._kept.items():
            if block_id not in self._pinned:
                by_strength[self.retention.strength(self._hash_of[block_id])].append(place)
                if len(by_strength[0]) == count:
                    break
        unwanted, retained, pinned = by_strength
        return unwanted + (retained + pinned)[: max(0, needed - len(unwanted))]

    def pin(self, block_ids: Iterable[BlockId]) -> None:
        """Keep kept blocks from being given up; hits may hold them all the same."""
        for block_id in block_ids:
            assert self.is_kept(block_id), f"block {block_id} is not kept"
            assert block_id not in self._pinned, f"block {block_id} is pinned already"
            self._pinned.add(block_id)

    def unpin(self, block_id: BlockId) -> None:
        """Let a block be given up again."""
        self._pinned.remove(block_id)

    def rename(self, source: BlockId, destination: BlockId) -> None:
        """Give a kept block's name, and its place in the order of release, to an unnamed block."""
        assert destination not in self._hash_of, f"block {destination} has a name already"
        place, block_hash = self._place_of.pop(source), self._hash_of.pop(source)
        self._kept[place] = destination
        self._place_of[destination] = place
        self._let_go_ns[destination] = self._let_go_ns.pop(source)
        self._block_of[block_hash] = destination
        self._hash_of[destination] = block_hash

    def unname(self, block_ids: Iterable[BlockId]) -> None:
        """Drop the names of blocks that are held, if they have one: nobody else is to hit them."""
        for block_id in block_ids:
            assert not self.is_idle(block_id), f"block {block_id} is held by nobody"
            block_hash = self._hash_of.pop(block_id, None)
            if block_hash is not None:
                del self._block_of[block_hash]
                if self.changes is not None:
                    self.changes[block_hash] = False

    def forget(self, block_ids: Iterable[BlockId]) -> None:
        """Drop the names of those blocks that are spare: they are about to be overwritten."""
        for block_id in self._spare.intersection(block_ids):
            self._spare.remove(block_id)
            del self._let_go_ns[block_id]
            block_hash = self._hash_of.pop(block_id)
            del self._block_of[block_hash]
            if self.changes is not None:
                self.changes[block_hash] = False

    def watch(self) -> dict[BlockHash, bool]:
        """Note from now on which names come and go; begin with all there are. The caller empties
        what is returned.
        """
        self.changes = dict.fromkeys(self._block_of, True)
        return self.changes

    def check(self) -> None:
        """Assert that the index is one to one and that idle blocks are in it once."""
        assert {b: h for h, b in self._block_of.items()} == self._hash_of
        assert {block_id: place for place, block_id in self._kept.items()} == self._place_of
        assert self._place_of.keys() <= self._hash_of.keys()
        assert self._pinned <= self._hash_of.keys() - self._spare
        assert self._hash_of.keys() >= self._spare
        assert not self._place_of.keys() & self._spare
        assert self._let_go_ns.keys() == self._place_of.keys() | self._spare
