"""Which block holds which content, in one group: index by hash, and the order of eviction.

It knows names and the order in which blocks were let go; who holds a block, and how many do, is
`kv/pool.py`'s, which calls it. A block named here is full and never changes until it is evicted.

Eviction takes the block that was let go first, with two exceptions within the `LOOK_AHEAD` that
follow it: a block next to free ones is taken before it, so that free segments grow long, and a
block whose child is still indexed is spared, because a prefix is found from its root and the child
would be out of reach.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from penstock.core.types import BlockHash, BlockId

LOOK_AHEAD: Final = 64
"""Releases after the oldest one among which eviction may choose."""


class PrefixCache:
    """Index from hash to block, and the idle blocks (held by nobody) in order of release."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._parent_of: dict[BlockHash, BlockHash] = {}
        self._num_children: dict[BlockHash, int] = {}
        self._idle: OrderedDict[BlockId, int] = OrderedDict()  # block -> when it was let go
        self._num_releases = 0

    @property
    def num_indexed(self) -> int:
        """Number of blocks that have a name."""
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        """Number of blocks that could be evicted."""
        return len(self._idle)

    def find(self, block_hash: BlockHash) -> BlockId | None:
        """Return the block with this content."""
        return self._block_of.get(block_hash)

    def is_indexed(self, block_id: BlockId) -> bool:
        """Tell whether the block has a name, by which it can be found."""
        return block_id in self._hash_of

    def is_idle(self, block_id: BlockId) -> bool:
        """Tell whether the block is kept for hits alone."""
        return block_id in self._idle

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

    def insert(
        self, block_id: BlockId, block_hash: BlockHash, parent: BlockHash | None = None
    ) -> None:
        """Name a full block that somebody holds; a name that is taken stays with its block.

        `parent` is the hash without which this one is never looked for; None where there is no
        such.
        """
        if block_hash in self._block_of:
            return
        assert block_id not in self._hash_of, f"block {block_id} has a name already"
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        if parent is not None:
            self._parent_of[block_hash] = parent
            self._num_children[parent] = self._num_children.get(parent, 0) + 1

    def park(self, block_id: BlockId) -> None:
        """Note that nobody holds the block any more: it may be evicted, as the latest of all."""
        assert block_id in self._hash_of, f"block {block_id} has no name to be kept for"
        assert block_id not in self._idle, f"block {block_id} is idle already"
        self._idle[block_id] = self._num_releases
        self._num_releases += 1

    def unpark(self, block_id: BlockId) -> None:
        """Note that an idle block is held again."""
        del self._idle[block_id]

    def evict(self, count: int, touches_free: Callable[[BlockId], bool]) -> list[BlockId]:
        """Forget `count` idle blocks and return them, in order."""
        assert count <= len(self._idle), f"{count} of {len(self._idle)} idle blocks to evict"
        victims: list[BlockId] = []
        chosen: set[BlockId] = set()

        def joins(block_id: BlockId) -> bool:
            return block_id - 1 in chosen or block_id + 1 in chosen or touches_free(block_id)

        while len(victims) < count:
            victim = self._neighbour(victims[-1]) if victims else None
            if victim is None:
                victim = self._oldest(joins)
            self._forget(victim)
            victims.append(victim)
            chosen.add(victim)
        return victims

    def check(self) -> None:
        """Assert that the index is one to one, idle blocks are in it, and children are counted."""
        assert {b: h for h, b in self._block_of.items()} == self._hash_of
        assert self._idle.keys() <= self._hash_of.keys()
        assert self._parent_of.keys() <= self._block_of.keys()
        counts: dict[BlockHash, int] = {}
        for parent in self._parent_of.values():
            counts[parent] = counts.get(parent, 0) + 1
        assert counts == self._num_children
        stamps = list(self._idle.values())
        assert stamps == sorted(stamps), "idle blocks are out of order"

    def _neighbour(self, last: BlockId) -> BlockId | None:
        """Return the block next to the last victim if it is nearly as old: runs at O(1) a block."""
        if not self._idle:
            return None
        latest = next(iter(self._idle.values())) + LOOK_AHEAD
        for candidate in (BlockId(last - 1), BlockId(last + 1)):
            if self._idle.get(candidate, latest) < latest and self._is_leaf(candidate):
                return candidate
        return None

    def _oldest(self, joins: Callable[[BlockId], bool]) -> BlockId:
        oldest_leaf = None
        for candidate in islice(self._idle, LOOK_AHEAD):
            if not self._is_leaf(candidate):
                continue
            if joins(candidate):
                return candidate
            if oldest_leaf is None:
                oldest_leaf = candidate
        # A child that is still in use may outlive its parent when it hangs on a second copy of it.
        return next(iter(self._idle)) if oldest_leaf is None else oldest_leaf

    def _is_leaf(self, block_id: BlockId) -> bool:
        return self._hash_of[block_id] not in self._num_children

    def _forget(self, block_id: BlockId) -> None:
        del self._idle[block_id]
        block_hash = self._hash_of.pop(block_id)
        del self._block_of[block_hash]
        parent = self._parent_of.pop(block_hash, None)
        if parent is not None:
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                del self._num_children[parent]
