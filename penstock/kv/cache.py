"""The KV cache of one worker as its core sees it: requests and tokens in, block tables out.

Owns every group's blocks and what each request holds of them. A request is opened, grows, reports
which tokens have been computed, and is closed; in between its blocks may be offered to another
worker, or adopted from one. It knows neither memory nor peers, and of time what `Retention` is
told: the worker core decides, the executor computes, the transport copies.

tokens of a request   0 ........ window ........ num_computed ........ capacity
full group            | held, full blocks named | held                 |
sliding group         | let go | held           | held                 |

What may find no room (`grow`, `reserve`, `adopt`) changes nothing when it does not, in any group.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.core.block import KVLayout
from penstock.core.messages import GroupBlocks
from penstock.core.step import Int32
from penstock.core.types import BlockHash, BlockId, Digest, RequestId
from penstock.kv.group import Adoption, GroupCache, Held
from penstock.kv.pool import Generations
from penstock.kv.retention import Retention
from penstock.kv.selection import streaming_blocks
from penstock.kv.table import BlockTables

NEVER: Final = 1 << 62
SINK_TOKENS: Final = 4
"""On which attention rests, whatever they say. Source: see `kv/selection.py`."""


@dataclass(slots=True)
class _Holding:
    """What one request holds, per group. All groups have been named up to entry `num_named`.

    `capacity` is the tokens with slots in all groups; below `due` computed tokens `advance` has
    nothing to do.
    """

    row: int
    groups: tuple[Held, ...]
    num_named: int
    capacity: int = 0
    due: int = 0


class KVCache:
    """Blocks of all requests of one worker, over all KV groups. `generations`: see `BlockPool`."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: Sequence[int],
        *,
        is_prefix_caching: bool = True,
        generations: Sequence[Generations] = (),
    ) -> None:
        self.layout = layout
        counters = generations or (None,) * len(num_blocks)
        self.groups = tuple(
            GroupCache(group, count, layout.block_size, counter)
            for group, count, counter in zip(layout.groups, num_blocks, counters, strict=True)
        )
        self.retention = Retention(min(num_blocks))
        for cache in self.groups:
            cache.pool.prefix_cache.retention = self.retention
        self._is_prefix_caching = is_prefix_caching
        self._tables = BlockTables(len(self.groups))
        self._holdings: dict[RequestId, _Holding] = {}

    # --- life of a request

    def open(self, request_id: RequestId, hashes: Sequence[BlockHash], max_tokens: int) -> int:
        """Start a request on the longest prefix that every group still has; return its tokens.

        They are a multiple of the block size and at most `max_tokens`. A sliding group needs no
        more of a prefix than what the next token looks at.
        """
        length = 0
        if self._is_prefix_caching:
            length = self._usable_prefix(hashes, min(len(hashes), max_tokens // self._block_size))
        held = tuple(group.hold_prefix(hashes, length) for group in self.groups)
        self._admit(request_id, held, num_named=length)
        return length * self._block_size

    def take_up(
        self, request_id: RequestId, hashes: Sequence[BlockHash], num_computed: int, max_tokens: int
    ) -> int:
        """Hold what has come into the cache since `open` in place of what is not computed yet;
        return how many tokens need not be, `max_tokens` at most. Not where a window slides.
        """
        if not self._is_prefix_caching or any(group.window for group in self.groups):
            return num_computed
        first, limit = num_computed // self._block_size, max_tokens // self._block_size
        end = min(group.known_until(hashes[:limit], first) for group in self.groups)
        if end <= first:
            return num_computed
        holding = self._holdings[request_id]
        for index, (group, held) in enumerate(zip(self.groups, holding.groups, strict=True)):
            self._tables.write(index, holding.row, first, group.take_up(held, hashes, first, end))
        self._derive(holding)
        return end * self._block_size

    def capacity(self, request_id: RequestId) -> int:
        """Return how many tokens of the request have slots in every group."""
        return self._holdings[request_id].capacity

    def grow(self, request_id: RequestId, num_tokens: int) -> bool:
        """Make slots for tokens `[0, num_tokens)`, by eviction if need be. False: no room.

        O(1) within a block that is there already.
        """
        holding = self._holdings[request_id]
        if num_tokens <= holding.capacity:
            return True
        return self._extend(holding, self._missing(holding, num_tokens))

    def reserve(self, request_id: RequestId, num_tokens: int) -> bool:
        """Make slots for tokens `[0, num_tokens)` in full-attention groups alone. False: no room.

        A prompt that is computed in chunks thus lies in as few runs as one that is computed at
        once, while a sliding group, where `grow` makes the slots, still holds no more than its
        window and a chunk.
        """
        holding = self._holdings[request_id]
        missing = self._missing(holding, num_tokens)
        counts = [0 if g.window else n for g, n in zip(self.groups, missing, strict=True)]
        return self._extend(holding, counts)

    def advance(
        self,
        request_id: RequestId,
        num_computed: int,
        hashes: Sequence[BlockHash],
        *,
        window: int = 0,
    ) -> None:
        """Note that the KV of tokens `[0, num_computed)` is valid and `hashes` names its blocks.

        Full blocks get their names and can be found from now on; blocks behind a sliding window are
        let go. O(1) while neither has become due. With a `window` only the first block and the last
        so many tokens are kept, which is no prefix any more: it is not offered to a peer. That is
        for layouts of one group without a window of its own.
        """
        holding = self._holdings[request_id]
        if window:
            self._keep_window(request_id, num_computed, window)
        if num_computed < holding.due:
            return
        assert num_computed <= holding.capacity, (request_id, num_computed, holding.capacity)
        num_full = min(num_computed // self._block_size, len(hashes))
        if self._is_prefix_caching and num_full > holding.num_named:
            for group, held in zip(self.groups, holding.groups, strict=True):
                group.name(held, hashes, holding.num_named, num_full)
            holding.num_named = num_full
        for index, (group, held) in enumerate(zip(self.groups, holding.groups, strict=True)):
            let_go = group.let_go_behind(held, num_computed)
            self._tables.clear(index, holding.row, let_go)
        self._derive(holding)

    def close(self, request_id: RequestId) -> None:
        """Let go of all the request holds; named blocks stay for prefix hits until evicted."""
        holding = self._holdings.pop(request_id)
        for group, held in zip(self.groups, holding.groups, strict=True):
            group.pool.release(held.held_ids)
        self._tables.give_row(holding.row)

    def disown(self, request_id: RequestId) -> None:
        """Drop the names of all blocks that the request holds: their content may be wrong."""
        holding = self._holdings[request_id]
        for group, held in zip(self.groups, holding.groups, strict=True):
            group.pool.prefix_cache.unname(held.held_ids)

    # --- hand-off

    def offer(
        self, request_id: RequestId, num_tokens: int, *, after: int = 0, is_last: bool = True
    ) -> tuple[GroupBlocks, ...]:
        """Return the blocks that a worker needs to continue after `num_tokens` tokens, per group.

        Those that tokens `[0, after)` fill have been offered before. They stay held until `close`.
        While more is to come (not `is_last`), blocks that are not full are left out, and so are
        sliding groups, which give nothing but what the token after the last one looks at.
        """
        end = self.layout.num_blocks(num_tokens) if is_last else num_tokens // self._block_size
        offered = []
        for group, held in zip(self.groups, self._holdings[request_id].groups, strict=True):
            if group.window and not is_last:
                offered.append(GroupBlocks(0, ()))
                continue
            first = group.first_needed(num_tokens) if group.window else after // self._block_size
            assert held.start <= first, f"{request_id} let go of entry {first} already"
            assert end <= len(held.block_ids), f"{request_id} has {held}, not {end} blocks"
            offered.append(group.offer(held, first, end))
        return tuple(offered)

    def runs(self, request_id: RequestId, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return the lengths of the runs in which the blocks lie that `offer` will give, per group.

        As far as they are there: a request that is still being computed may have no more.
        """
        end = self.layout.num_blocks(num_tokens)
        groups = zip(self.groups, self._holdings[request_id].groups, strict=True)
        return tuple(g.runs(held, g.first_needed(num_tokens), end) for g, held in groups)

    def is_reserved(self, request_id: RequestId, num_tokens: int) -> bool:
        """Tell whether every full-attention group has slots for tokens `[0, num_tokens)`."""
        missing = self._missing(self._holdings[request_id], num_tokens)
        return all(g.window or not n for g, n in zip(self.groups, missing, strict=True))

    def adopt(
        self,
        request_id: RequestId,
        hashes: Sequence[BlockHash],
        num_tokens: int,
        runs: Sequence[Sequence[int]] | None,
        *,
        gaps: tuple[range, ...] = (),
    ) -> Adoption | None:
        """Start a request whose first `num_tokens` tokens lie in a peer's `runs`; None: no room.

        Blocks that are here already are held instead of pulled, the others reserved in runs like
        the peer's. They get their names by `advance`, once the pull has landed; a `close` without
        it leaves no trace of them.

        Where the peer's blocks have another shape, `runs` is None. Then what is missing is one
        range of tokens for each group: a hit is held only if all before it are hits. The peer may
        have nothing of a sliding group before the first token that the next one looks at.

        The peer has let go of entries in `gaps` (`let_go`): they are gaps here as well.
        """
        named = hashes[: num_tokens // self._block_size] if self._is_prefix_caching else ()
        end = self.layout.num_blocks(num_tokens)
        plan = []
        for index, group in enumerate(self.groups):
            entries = range(group.first_needed(num_tokens), end)
            wanted = group.want(named, entries, gaps, is_prefix=runs is None)
            plan.append((group, wanted, () if runs is None else runs[index]))
        if not all(group.can_adopt(wanted) for group, wanted, _ in plan):
            return None
        held, adopted = zip(*(g.adopt(wanted, lengths) for g, wanted, lengths in plan), strict=True)
        if runs is None:
            for (group, wanted, _), group_held in zip(plan, held, strict=True):
                first = wanted.entries.start
                is_whole = first * self._block_size >= group.first_seen(num_tokens)
                if first not in wanted.hits and not is_whole:
                    group_held.whole_from = first + 1
        self._admit(request_id, held, num_named=0)
        cached = min((e for group in adopted for e in group.destination_of), default=end)
        return Adoption(min(cached * self._block_size, num_tokens), adopted)

    def note_digests(self, group: int, digests: Iterable[tuple[BlockId, Digest]]) -> None:
        """Remember the digests of blocks of one group whose content is complete."""
        for block_id, digest in digests:
            self.groups[group].pool.note_digest(block_id, digest)

    def watch_names(self) -> dict[BlockHash, bool]:
        """Return the names that a prefix look-up needs as they come (True) and go, from all there
        are now; the caller empties it. Of a full-attention group, where there is one.
        """
        groups = sorted(self.groups, key=lambda group: group.window > 0)
        return groups[0].pool.prefix_cache.watch()

    # --- queries

    def held(self, request_id: RequestId) -> tuple[list[BlockId], ...] | None:
        """Return the blocks that an open request holds, per group, in order; None if it is not."""
        holding = self._holdings.get(request_id)
        return None if holding is None else tuple(h.held_ids for h in holding.groups)

    def tables(self, request_ids: Iterable[RequestId], max_tokens: int) -> tuple[Int32, ...]:
        """Return a copy of block tables for up to `max_tokens` tokens, [S, W] int32 per group.

        Entries without a block are 0.
        """
        holdings = self._holdings
        rows = [holdings[request_id].row for request_id in request_ids]
        return self._tables.gather(rows, self.layout.num_blocks(max_tokens))

    def let_go(self, request_id: RequestId, gaps: tuple[range, ...]) -> None:
        """Let go of these entries of a table, of all that were let go of before among them. For
        layouts of one group without a window of its own.
        """
        holding = self._holdings[request_id]
        (group,), (held,) = self.groups, holding.groups
        if gaps != held.gaps:
            group.let_go_in(held, gaps)
            self._tables.open_gaps(holding.row, gaps)

    def gaps_of(self, request_id: RequestId) -> tuple[tuple[int, int], ...]:
        """Return what a request has let go of: the first entry of each gap and how many."""
        gaps = self._holdings[request_id].groups[0].gaps
        return tuple((gap.start, len(gap)) for gap in gaps)

    def gaps(self, request_ids: Iterable[RequestId]) -> Int32 | None:
        """Return which tables have gaps, the first entry and how many, [G, 3]; None: none has."""
        return self._tables.gaps(self._holdings[request_id].row for request_id in request_ids)

    @property
    def num_requests(self) -> int:
        """Number of open requests."""
        return len(self._holdings)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Blocks without content, per group."""
        return tuple(group.pool.num_free for group in self.groups)

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """Blocks kept for prefix hits alone, per group."""
        return tuple(group.pool.num_cached for group in self.groups)

    @property
    def fragmentation(self) -> tuple[float, ...]:
        """Share of the blocks that may be written outside their longest run, per group."""
        return tuple(group.pool.allocator.external_fragmentation for group in self.groups)

    def check(self) -> None:
        """Assert that every pool balances and that a block has as many holders as holdings."""
        self.retention.check()
        for index, group in enumerate(self.groups):
            group.pool.check()
            counts = [0] * group.pool.num_blocks
            for request_id, holding in self._holdings.items():
                held = holding.groups[index]
                for block_id in held.held_ids:
                    counts[block_id] += 1
                row = self._tables.gather([holding.row], len(held.block_ids))[index][0].tolist()
                assert row == held.block_ids, f"{request_id}: row {row} is not {held}"
            holders = group.pool.holders
            assert holders == counts, f"group {index}: {holders} holders, held {counts}"

    # --- internal

    @property
    def _block_size(self) -> int:
        return self.layout.block_size

    def _usable_prefix(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """Shorten the prefix until every group can continue from it.

        More than one round only where two sliding groups disagree: a shorter prefix needs other
        blocks.
        """
        length, before = limit, -1
        while length != before:
            before = length
            for group in self.groups:
                length = group.longest_usable(hashes, length)
        return length

    def _admit(self, request_id: RequestId, held: tuple[Held, ...], *, num_named: int) -> None:
        assert request_id not in self._holdings, f"{request_id} is open already"
        holding = _Holding(self._tables.take_row(), held, num_named)
        for index, group_held in enumerate(held):
            entries = group_held.block_ids[group_held.start :]
            self._tables.write(index, holding.row, group_held.start, entries)
            self._tables.open_gaps(holding.row, group_held.gaps)
        self._derive(holding)
        self._holdings[request_id] = holding

    def _keep_window(self, request_id: RequestId, num_tokens: int, window: int) -> None:
        num_blocks = self.layout.num_blocks(num_tokens)
        front, recent = streaming_blocks(
            num_blocks, block_size=self._block_size, num_sinks=SINK_TOKENS, window=window
        )
        if front.stop < recent.start:
            self.let_go(request_id, (range(front.stop, recent.start),))

    def _missing(self, holding: _Holding, num_tokens: int) -> list[int]:
        wanted = self.layout.num_blocks(num_tokens)
        return [max(0, wanted - len(held.block_ids)) for held in holding.groups]

    def _has_room(self, counts: Sequence[int]) -> bool:
        return all(n <= g.pool.num_available for n, g in zip(counts, self.groups, strict=True))

    def _extend(self, holding: _Holding, counts: Sequence[int]) -> bool:
        """Add `counts[g]` blocks to every group g, or none to any."""
        if not self._has_room(counts):
            return False
        for index, (group, held, count) in enumerate(
            zip(self.groups, holding.groups, counts, strict=True)
        ):
            if count:
                end = len(held.block_ids)
                self._tables.write(index, holding.row, end, group.extend(held, count))
        self._derive(holding)
        return True

    def _derive(self, holding: _Holding) -> None:
        """Derive `capacity` and `due` from what is held."""
        size = self._block_size
        holding.capacity = size * min(len(held.block_ids) for held in holding.groups)
        due = (holding.num_named + 1) * size if self._is_prefix_caching else NEVER
        for group, held in zip(self.groups, holding.groups, strict=True):
            due = min(due, group.due(held) or NEVER)
        holding.due = due
