"""One KV group of a worker: its block pool, and what a sliding window changes in it.

A full-attention group keeps all blocks of a request and finds a prefix from its root. A group with
a sliding window keeps what the next token looks at, and can use a prefix as soon as it has the end
of it. It knows what one request holds when told (`Held`), not which requests there are:
`kv/cache.py`, its only caller, does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Final

from penstock.core.block import KVGroup
from penstock.core.messages import GroupBlocks
from penstock.core.types import NO_DIGEST, BlockHash, BlockId, Digest
from penstock.kv.allocator import run_lengths
from penstock.kv.pool import BlockPool, Generations

NO_BLOCK: Final = BlockId(0)
"""Says in a block table that no block is held. Block 0 exists too: such an entry is never read."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks to be copied: the peer's `source_ids[i]` into our `destination_ids[i]`, where
    `digests[i]` must come out, and the peer's block be of `generations[i]` still, if the offer has
    such.
    """

    source_ids: tuple[BlockId, ...]
    destination_ids: tuple[BlockId, ...]
    digests: tuple[Digest, ...] = ()
    generations: tuple[int, ...] = ()

    @property
    def is_verified(self) -> bool:
        """True when each block that comes has a digest to be compared with."""
        return not self.source_ids or (bool(self.digests) and all(self.digests))

    @classmethod
    def joined(cls, parts: Iterable["Pull"]) -> "Pull":
        """Return several pulls as one."""
        wanted = [part for part in parts if part.source_ids]
        columns = ("source_ids", "destination_ids", "digests", "generations")
        joined = (tuple(x for part in wanted for x in getattr(part, name)) for name in columns)
        pull = cls(*joined)
        if len(pull.digests) in (0, len(pull.source_ids)):
            return pull
        # A part without any comes after or before one with some.
        padded = (p.digests or (NO_DIGEST,) * len(p.source_ids) for p in wanted)
        return replace(pull, digests=tuple(digest for part in padded for digest in part))


@dataclass(frozen=True, slots=True)
class Adopted:
    """Blocks that wait for a peer's content: `destination_of[i]` for entry i of the block table.

    Entries that are not in it are here already, or not needed.
    """

    destination_of: Mapping[int, BlockId]

    def pull(self, offered: GroupBlocks) -> Pull:
        """Return what to copy of the offered blocks."""
        entries = range(offered.first, offered.first + len(offered.block_ids))
        destination_of = self.destination_of
        rows = [(i, destination_of[e]) for i, e in enumerate(entries) if e in destination_of]
        return Pull(
            tuple(offered.block_ids[i] for i, _ in rows),
            tuple(block_id for _, block_id in rows),
            tuple(offered.digests[i] for i, _ in rows) if offered.digests else (),
            tuple(offered.generations[i] for i, _ in rows) if offered.generations else (),
        )


@dataclass(frozen=True, slots=True)
class Adoption:
    """What `KVCache.adopt` reserved: the first `cached_tokens` tokens need no pull in any group."""

    cached_tokens: int
    groups: tuple[Adopted, ...]

    def pulls(self, offered: Sequence[GroupBlocks]) -> tuple[Pull, ...]:
        """Return what to copy of blocks that are offered, per group."""
        return tuple(adopted.pull(o) for adopted, o in zip(self.groups, offered, strict=True))


@dataclass(slots=True)
class Held:
    """What one request holds in one group: `block_ids[i]` is entry i of its block table.

    Entries before `start`, and those in `gaps` (ascending, apart from each other), have been let
    go, or were never needed, and are `NO_BLOCK`. Blocks before entry `whole_from` lack tokens that
    nobody looks at any more, and get no name.
    """

    start: int
    block_ids: list[BlockId]
    whole_from: int = 0
    gaps: tuple[range, ...] = ()

    @property
    def held_ids(self) -> list[BlockId]:
        """The blocks really held, in order."""
        if not self.gaps:
            return self.block_ids[self.start :]
        return [self.block_ids[entry] for entry in self.held_in(self.start, len(self.block_ids))]

    def held_in(self, begin: int, end: int) -> list[int]:
        """Return the entries of `[begin, end)` that no gap has."""
        return outside(range(begin, end), self.gaps)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Entries that are to be adopted, without those in `gaps`, and which of them are here."""

    entries: range
    gaps: tuple[range, ...]
    hits: Mapping[int, BlockId]

    @property
    def held(self) -> list[int]:
        """The entries that get a block, in order."""
        return outside(self.entries, self.gaps)


class GroupCache:
    """Blocks of one group. Indexes and counts are in blocks unless a name says tokens."""

    def __init__(
        self,
        group: KVGroup,
        num_blocks: int,
        block_size: int,
        generations: Generations | None = None,
    ) -> None:
        self.window = group.window
        self.pool = BlockPool(num_blocks, generations)
        self._block_size = block_size

    def first_needed(self, num_tokens: int) -> int:
        """Return the first entry that the token after `num_tokens` tokens looks at.

        A window of w tokens counts the token itself, so it reaches back w - 1 tokens.
        """
        return self.first_seen(num_tokens) // self._block_size

    def first_seen(self, num_tokens: int) -> int:
        """Return the first token that the token after `num_tokens` tokens looks at."""
        return max(0, num_tokens - self.window + 1) if self.window else 0

    def due(self, held: Held) -> int | None:
        """Return the number of computed tokens from which on a block can be let go."""
        if not self.window:
            return None
        return (held.start + 1) * self._block_size + self.window - 1

    def longest_usable(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """Return the length of the longest prefix, of `limit` blocks at most, to continue from."""
        if not self.window:
            return self.pool.prefix_cache.longest_prefix(hashes, limit)
        return self.pool.prefix_cache.longest_window(
            hashes, limit, lambda length: self.first_needed(length * self._block_size)
        )

    def hold_prefix(self, hashes: Sequence[BlockHash], length: int) -> Held:
        """Hold what a prefix of `length` blocks, found by `longest_usable`, needs."""
        start = self.first_needed(length * self._block_size)
        hits = self.find(hashes[:length], start)
        assert len(hits) == length - start, (
            f"prefix of {length} blocks has {len(hits)} from {start}"
        )
        self.pool.hold(hits.values())
        return Held(start, [NO_BLOCK] * start + list(hits.values()))

    def find(self, hashes: Sequence[BlockHash], first: int) -> dict[int, BlockId]:
        """Return the blocks that have the content of `hashes[first:]`, by entry, in order."""
        find = self.pool.prefix_cache.find
        found = ((i, find(hashes[i])) for i in range(first, len(hashes)))
        return {i: block_id for i, block_id in found if block_id is not None}

    def want(
        self,
        hashes: Sequence[BlockHash],
        entries: range,
        gaps: tuple[range, ...],
        *,
        is_prefix: bool,
    ) -> Wanted:
        """Return what to adopt of `entries`: a block that is here is a hit, or where `is_prefix`
        only if all before it are.
        """
        hits = self.find(hashes, entries.start)
        if is_prefix:
            hits = {e: hits[e] for e in takewhile(hits.__contains__, entries)}
        return Wanted(entries, gaps, {e: hits[e] for e in outside(hits, gaps)})

    def can_adopt(self, wanted: Wanted) -> bool:
        """Tell whether there is room for what is wanted and not hit, without evicting a hit."""
        hits = wanted.hits
        num_idle_hits = sum(map(self.pool.prefix_cache.is_idle, hits.values()))
        return len(wanted.held) - len(hits) <= self.pool.num_available - num_idle_hits

    def adopt(self, wanted: Wanted, runs: Sequence[int]) -> tuple[Held, Adopted]:
        """Hold the hits, and for the other entries new blocks in runs like the peer's.

        `runs` are the lengths of the peer's runs over all entries; none means one.
        """
        entries, hits = wanted.entries, wanted.hits
        self.pool.hold(hits.values())
        missing = [entry for entry in wanted.held if entry not in hits]
        block_ids = self.pool.allocate_like(_runs_over(missing, entries.start, runs))
        assert block_ids is not None, f"room for {len(missing)} blocks vanished"
        destination_of = dict(zip(missing, block_ids, strict=True))
        block_of = {**hits, **destination_of}
        held = [NO_BLOCK] * entries.start + [block_of.get(entry, NO_BLOCK) for entry in entries]
        return Held(entries.start, held, gaps=wanted.gaps), Adopted(destination_of)

    def offer(self, held: Held, first: int, end: int) -> GroupBlocks:
        """Return entries `[first, end)` as they are offered.

        With the digests that there are: a block that decoding has begun to fill has none.
        """
        block_ids = tuple(held.block_ids[first:end])
        digests = tuple(map(self.pool.digest, block_ids))
        generations = self.pool.generations(block_ids)
        return GroupBlocks(first, block_ids, digests if any(digests) else (), generations)

    def runs(self, held: Held, first: int, end: int) -> tuple[int, ...]:
        """Return the lengths of the runs in which entries `[first, end)` lie, as far as held."""
        return tuple(run_lengths(held.block_ids[max(first, held.start) : end]))

    def extend(self, held: Held, count: int) -> list[BlockId]:
        """Append `count` blocks, adjacent to the last where possible; the caller saw the room."""
        last = held.block_ids[-1] if len(held.block_ids) > held.start else None
        added = self.pool.allocate(count, after=last)
        assert added is not None, f"room for {count} blocks vanished"
        held.block_ids += added
        return added

    def known_until(self, hashes: Sequence[BlockHash], first: int) -> int:
        """Return from which entry on, counted from `first`, the cache has no content of these."""
        return first + self.pool.prefix_cache.longest_prefix(hashes[first:], len(hashes) - first)

    def take_up(
        self, held: Held, hashes: Sequence[BlockHash], first: int, end: int
    ) -> list[BlockId]:
        """Hold the blocks with the content of entries `[first, end)` in place of those there."""
        block_ids = list(self.find(hashes[:end], first).values())
        self.pool.hold(block_ids)
        replaced = held.block_ids[first:end]
        held.block_ids[first:end] = block_ids
        self.pool.release(replaced)
        return block_ids

    def name(self, held: Held, hashes: Sequence[BlockHash], begin: int, end: int) -> None:
        """Name the full blocks at entries `[begin, end)` as far as they are held."""
        for i in held.held_in(max(begin, held.start, held.whole_from), end):
            self.pool.insert(held.block_ids[i], hashes[i])

    def let_go_behind(self, held: Held, num_tokens: int) -> range:
        """Release what the token after `num_tokens` does not look at; return the entries."""
        let_go = range(held.start, max(held.start, self.first_needed(num_tokens)))
        if let_go:
            self.pool.release(held.block_ids[let_go.start : let_go.stop])
            held.block_ids[let_go.start : let_go.stop] = [NO_BLOCK] * len(let_go)
            held.start = let_go.stop
        return let_go

    def let_go_in(self, held: Held, gaps: tuple[range, ...]) -> None:
        """Release what is held in `gaps`, which have all that was let go of like this before."""
        before = set(held.held_in(0, len(held.block_ids)))
        let_go = [entry for gap in gaps for entry in gap if entry in before]
        self.pool.release([held.block_ids[entry] for entry in let_go])
        for entry in let_go:
            held.block_ids[entry] = NO_BLOCK
        held.gaps = gaps


def outside(entries: Iterable[int], gaps: Iterable[range]) -> list[int]:
    """Return the entries that no gap has, in their order."""
    absent = {entry for gap in gaps for entry in gap}
    return [entry for entry in entries if entry not in absent]


def _runs_over(missing: Sequence[int], first: int, runs: Sequence[int]) -> list[int]:
    """Return the lengths of the runs that `missing` entries lie in at a peer whose table, from
    entry `first` on, lies in `runs`.
    """
    starts = {first + offset for offset in accumulate(runs, initial=0)}
    lengths: list[int] = []
    before = None
    for entry in missing:
        if before is None or entry != before + 1 or entry in starts:
            lengths.append(0)
        lengths[-1] += 1
        before = entry
    return lengths
