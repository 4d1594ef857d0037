"""`PrefixIndex`: which workers have which named blocks, so that a request can go to its prefix.

Fed by what workers say of their prefix caches (`BlocksChanged`). It is a hint: a worker that has
evicted a block since just computes it. Workers are bits: each has a slot, a name maps to the set of
slots that have its block, and the longest prefix of all workers is found in one walk along the
prompt's names. A worker that is gone loses its slot, and with it everything at once; its bits are
swept out later.

Memory is bounded: the index holds two generations of names, and when the younger one is full the
older one is forgotten. A name that is looked up or stored again becomes young.

The walk goes block by block, and only what is walked is hashed: a prompt that nobody has costs the
hash of its first block, and hashing, not looking up, is what a long prefix costs.
"""

from collections.abc import Iterable, Iterator, Sequence
from struct import pack
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import name_block
from penstock.core.types import BlockHash

BLOCKS_MAX: Final = 4_000_000
"""Names in the index, about 150 bytes each."""
CHUNK_BLOCKS: Final = 8
"""Blocks that are known or not as one."""
KNOWN_MAX: Final = 30_000
"""Chunks and blocks whose names are remembered, 600 and 250 bytes each."""
DEAD_SLOTS_MAX: Final = 64
FEW_WORKERS: Final = 12

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


Known = dict[tuple[BlockHash, int], tuple[BlockHash, ...]]
"""Names of a chunk of blocks, or of one, by what is before it and a 64-bit hash of its tokens."""


def walk_names(
    token_ids: Sequence[int], block_size: int, root: BlockHash, known: Known
) -> Iterator[tuple[BlockHash, ...]]:
    """Yield the names of a prompt's full blocks behind `root` in order, those of a known chunk
    together; each also names all before it, and is hashed when somebody asks for it.

    A block that was walked is `known` from then on, and not named again, nor is a chunk that was
    walked to its end: prompts share their beginnings. Should two ever be taken for one another, a
    prompt goes where its prefix is not, and is computed there.
    """
    token_ids, size, parent = tuple(token_ids), block_size, root
    layout = f"<{size}I"
    num_tokens = len(token_ids) // size * size
    for start in range(0, num_tokens, CHUNK_BLOCKS * size):
        stop = min(start + CHUNK_BLOCKS * size, num_tokens)
        chunk = parent, hash(token_ids[start:stop])
        names = known.get(chunk)
        if names is not None:
            yield names
            parent = names[-1]
            continue
        walked = []
        for begin in range(start, stop, size):
            tokens = token_ids[begin : begin + size]
            block = parent, hash(tokens)
            names = known.get(block)
            if names is None:
                names = known[block] = (name_block(parent, pack(layout, *tokens)),)
            yield names
            (parent,) = names
            walked.append(parent)
        known[chunk] = tuple(walked)


Level = tuple[int, int]
"""How many blocks long the longest prefix of some workers is, and who they are, as bits."""


class PrefixIndex:
    """From block names to the workers that have them."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._young: dict[BlockHash, int] = {}
        self._old: dict[BlockHash, int] = {}
        self._generation_max = max(blocks_max // 2, 1)
        self._live = 0
        self._free: list[int] = []
        self._dead: list[int] = []
        self._num_slots = 0
        self._known: Known = {}
        self._num_changes = 0
        self._latest: tuple[Sequence[int], tuple[int, BlockHash, int], Float64] | None = None

    @property
    def num_blocks(self) -> int:
        """Names in the index."""
        return len(self._young) + len(self._old)

    @property
    def num_slots(self) -> int:
        """All slots are below this."""
        return self._num_slots

    def add_worker(self) -> int:
        """Return a slot for a new worker, or a new incarnation of one. It has no blocks yet."""
        if not self._free and len(self._dead) >= max(DEAD_SLOTS_MAX, self._live.bit_count()):
            self._sweep()
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._num_slots
            self._num_slots += 1
        self._live |= 1 << slot
        self._num_changes += 1
        return slot

    def drop_worker(self, slot: int) -> None:
        """Forget a worker and all its blocks at once. O(1)."""
        assert self._live >> slot & 1, f"slot {slot} is not in use"
        self._live &= ~(1 << slot)
        self._dead.append(slot)
        self._num_changes += 1

    def apply(
        self, slot: int, stored: Iterable[BlockHash], removed: Iterable[BlockHash] = ()
    ) -> None:
        """Note what a worker has and has no more. O(1) a block."""
        bit = 1 << slot
        self._num_changes += 1
        young, old = self._young, self._old
        for name in removed:
            for generation in (young, old):
                workers = generation.get(name, 0)
                if workers & bit:
                    if workers == bit:
                        del generation[name]
                    else:
                        generation[name] = workers & ~bit
        for name in stored:
            having = young.get(name)
            young[name] = (old.pop(name, 0) if having is None else having) | bit
        if len(young) > self._generation_max:
            self._age()

    def levels(self, blocks: Iterable[tuple[BlockHash, ...]]) -> list[Level]:
        """Return which workers have how much of a prompt, least first; each worker is in one level.

        Workers evict no block before those that follow it: who has the last block of a known chunk
        has all of it, and the ends of most chunks tell what is between. O(blocks that somebody
        has).
        """
        levels: list[Level] = []
        live, num_blocks, before = self._live, 0, -1
        find = self._young.get
        for names in blocks:
            alike = len(names)
            if alike > 1:
                last = find(names[-1])
                if last == before:
                    num_blocks += alike
                    continue
                if last is None or last != find(names[0]):
                    alike = 1
            for name in names[::alike]:
                having = find(name) or self._rejuvenate(name)
                if having != before:
                    before = having
                    left = live & having
                    if left != live:
                        levels.append((num_blocks, live ^ left))
                        live = left
                        if not live:
                            return levels
                num_blocks += alike
        levels.append((num_blocks, live))
        return levels

    def tokens(self, token_ids: Sequence[int], block_size: int, root: BlockHash) -> Float64:
        """Return how many tokens of a prompt each slot has, [num_slots]; not to be written to. All
        but one at most, for the last is computed in any case.

        A prompt is asked about several times, when it comes and while it waits at the head of the
        queue: until blocks or workers change the answer is the same.
        """
        asked = block_size, root, self._num_changes
        if self._latest is not None:
            prompt, before, tokens = self._latest
            if prompt is token_ids and before == asked:
                return tokens
        tokens = self._look_up(token_ids, block_size, root)
        self._latest = token_ids, asked, tokens
        return tokens

    def _look_up(self, token_ids: Sequence[int], block_size: int, root: BlockHash) -> Float64:
        if len(self._known) > KNOWN_MAX:
            self._known.clear()
        levels = self.levels(walk_names(token_ids, block_size, root, self._known))
        # Most workers have the same: a beginning that is everybody's, or nothing.
        usual, num_usual = 0, -1
        for num_blocks, workers in levels:
            if (num_workers := workers.bit_count()) > num_usual:
                usual, num_usual = num_blocks, num_workers
        most = len(token_ids) - 1
        tokens = np.empty(self._num_slots)
        tokens.fill(min(usual * block_size, most))
        if usual and self._dead:
            _put(tokens, (1 << self._num_slots) - 1 ^ self._live, 0)
        for num_blocks, workers in levels:
            if num_blocks != usual:
                _put(tokens, workers, min(num_blocks * block_size, most))
        return tokens

    def _rejuvenate(self, name: BlockHash) -> int:
        """Return who has a block that was not asked for of late; it is young again."""
        workers = self._old.pop(name, 0)
        if workers:
            self._young[name] = workers
        return workers

    def _age(self) -> None:
        self._old = self._young
        self._young = {}

    def _sweep(self) -> None:
        """Take the bits of dead workers out of every name. O(names), once in many deaths."""
        live = self._live
        for generation in (self._young, self._old):
            kept = {name: workers & live for name, workers in generation.items() if workers & live}
            generation.clear()
            generation.update(kept)
        self._free += self._dead
        self._dead.clear()

    def check(self) -> None:
        """Assert that slots are in one state each, and that names are bounded and not empty."""
        live = [slot for slot in range(self._num_slots) if self._live >> slot & 1]
        assert sorted(live + self._free + self._dead) == list(range(self._num_slots))
        assert not self._young.keys() & self._old.keys()


def _put(tokens: Float64, workers: int, num_tokens: int) -> None:
    """Write one number to the slots of a set of workers; a few are soonest done one by one."""
    if workers.bit_count() > FEW_WORKERS:
        tokens[slots_of(workers)] = num_tokens
        return
    while workers:
        slot = workers.bit_length() - 1
        tokens[slot] = num_tokens
        workers ^= 1 << slot


def slots_of(workers: int) -> Int64:
    """Return the slots of a set of workers, ascending."""
    data = workers.to_bytes((workers.bit_length() + 7) // 8, "little")
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
