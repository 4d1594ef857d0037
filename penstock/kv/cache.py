"""The KV cache of one worker as its core sees it: requests and tokens in, block tables out.

Owns every block pool (one per KV group) and what each request holds. A request is opened, grows
slot by slot, reports which tokens have been computed, and is closed; in between its blocks may be
offered to another worker, or adopted from one. It knows neither time nor memory nor peers: the
worker core decides, the executor computes, the transport copies.

tokens of a request   0 ........ window_start ........ num_computed ........ capacity
full group            | held and named (full blocks)    | held               |
sliding group         | let go  | held                  | held               |

All methods that may find no room change nothing when they do not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import GroupBlocks
from penstock.core.step import Int32
from penstock.core.types import BlockHash, BlockId, RequestId
from penstock.kv.allocator import run_lengths
from penstock.kv.pool import BlockPool
from penstock.kv.table import BlockTables

NO_BLOCK: Final = BlockId(0)
"""What a block table says where it holds no block. Block 0 exists too: such an entry is never
read.
"""

NEVER: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks of one group still to be copied: `source_ids[i]` of the peer into our
    `destination_ids[i]`.
    """

    source_ids: tuple[BlockId, ...]
    destination_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Adoption:
    """What `KVCache.adopt` reserved. The first `cached_tokens` tokens were here already, in every
    group.
    """

    cached_tokens: int
    pulls: tuple[Pull, ...]


@dataclass(slots=True)
class _Holding:
    """Blocks of one request: `blocks[g][i]` holds tokens `[i * block_size, (i + 1) * block_size)`.

    `starts[g]` is the first entry still held in group g, `num_named` the entries that have been
    given their name. Below `due` computed tokens there is nothing to name and nothing to let go.
    """

    row: int
    blocks: list[list[BlockId]]
    starts: list[int]
    num_named: int = 0
    capacity: int = 0
    due: int = 0


class KVCache:
    """Blocks of all requests of one worker, over all KV groups."""

    def __init__(
        self, layout: KVLayout, num_blocks: tuple[int, ...], *, is_prefix_caching: bool = True
    ) -> None:
        assert len(num_blocks) == len(layout.groups), (num_blocks, layout.groups)
        self.layout = layout
        self.pools = tuple(BlockPool(count) for count in num_blocks)
        self._block_size = layout.block_size
        self._is_prefix_caching = is_prefix_caching
        self._tables = BlockTables(len(num_blocks))
        self._holdings: dict[RequestId, _Holding] = {}

    # ---------------------------------------------------------------------------- life of a request

    def open(self, request_id: RequestId, hashes: Sequence[BlockHash], max_tokens: int) -> int:
        """Start a request on the longest prefix that every group still has; return its length in
        tokens.

        The length is a multiple of the block size and at most `max_tokens`. A sliding group needs
        to have only the blocks that the next token looks at.
        """
        assert request_id not in self._holdings, f"{request_id} is open already"
        limit = min(len(hashes), max_tokens // self._block_size)
        length = self._usable_prefix(hashes, limit) if self._is_prefix_caching else 0
        starts, blocks = [], []
        for group, pool in zip(self.layout.groups, self.pools, strict=True):
            start = self._first_needed(group, length * self._block_size)
            found = [pool.prefix_cache.find(block_hash) for block_hash in hashes[start:length]]
            hits = [block_id for block_id in found if block_id is not None]
            assert len(hits) == length - start, f"{request_id}: the prefix vanished"
            pool.hold(hits)
            starts.append(start)
            blocks.append([NO_BLOCK] * start + hits)
        self._admit(request_id, blocks, starts, num_named=length)
        return length * self._block_size

    def capacity(self, request_id: RequestId) -> int:
        """Return how many tokens of the request have slots in every group."""
        return self._holdings[request_id].capacity

    def grow(self, request_id: RequestId, num_tokens: int) -> bool:
        """Make slots for tokens `[0, num_tokens)`; evicts cached blocks as needed. False: no room,
        nothing changed.
        """
        holding = self._holdings[request_id]
        if num_tokens <= holding.capacity:
            return True
        return self._extend(holding, self._missing(holding, num_tokens))

    def can_grow(self, request_id: RequestId, num_tokens: int) -> bool:
        """Tell whether `grow` would succeed now."""
        return self._has_room(self._missing(self._holdings[request_id], num_tokens))

    def reserve(self, request_id: RequestId, num_tokens: int) -> bool:
        """Make slots for tokens `[0, num_tokens)` in the full-attention groups alone. False: no
        room, nothing changed.

        A prompt that is computed in chunks thus lies in as few runs as if it were computed at once,
        while its sliding groups still hold no more than a window and a chunk (`grow` makes their
        slots).
        """
        holding = self._holdings[request_id]
        missing = self._missing(holding, num_tokens)
        for index, group in enumerate(self.layout.groups):
            if group.window:
                missing[index] = 0
        return self._extend(holding, missing)

    def advance(
        self, request_id: RequestId, num_computed: int, hashes: Sequence[BlockHash]
    ) -> None:
        """Note that the KV of tokens `[0, num_computed)` is valid, `hashes` naming their full
        blocks.

        Full blocks get their names and can be found from now on; blocks behind a sliding window are
        let go. O(1) when neither has become due.
        """
        holding = self._holdings[request_id]
        if num_computed < holding.due:
            return
        assert num_computed <= holding.capacity, (
            f"{request_id}: {num_computed} tokens in {holding.capacity}"
        )
        if self._is_prefix_caching:
            self._name(holding, hashes, min(num_computed // self._block_size, len(hashes)))
        for index, group in enumerate(self.layout.groups):
            if group.window:
                self._let_go_before(holding, index, self._first_needed(group, num_computed))
        self._update(holding)

    def close(self, request_id: RequestId) -> None:
        """Let go of everything the request holds; named blocks stay for prefix hits until they are
        evicted.
        """
        holding = self._holdings.pop(request_id)
        for pool, blocks, start in zip(self.pools, holding.blocks, holding.starts, strict=True):
            pool.release(blocks[start:])
        self._tables.give_row(holding.row)

    # ------------------------------------------------------------------------------------- hand-off

    def offer(self, request_id: RequestId, num_tokens: int) -> tuple[GroupBlocks, ...]:
        """Return the blocks that a worker needs to continue after `num_tokens` tokens, per group.

        They stay held until `close`. A sliding group gives only what the next token looks at.
        """
        holding = self._holdings[request_id]
        end = self.layout.num_blocks(num_tokens)
        offered = []
        for index, group in enumerate(self.layout.groups):
            first = self._first_needed(group, num_tokens)
            assert holding.starts[index] <= first, (
                f"{request_id} let go of {first} in group {index}"
            )
            offered.append(GroupBlocks(first, tuple(holding.blocks[index][first:end])))
        return tuple(offered)

    def adopt(
        self,
        request_id: RequestId,
        hashes: Sequence[BlockHash],
        num_tokens: int,
        offered: tuple[GroupBlocks, ...],
    ) -> Adoption | None:
        """Start a request whose first `num_tokens` tokens lie in a peer's `offered` blocks; None:
        no room.

        Blocks that are here already are held instead of pulled; the others are reserved in runs
        like the peer's. They get their names by `advance`, after the pull has landed; `close` after
        a failed one names nothing.
        """
        assert request_id not in self._holdings, f"{request_id} is open already"
        end = self.layout.num_blocks(num_tokens)
        assert all(
            o.first <= self._first_needed(g, num_tokens) and o.first + len(o.block_ids) == end
            for o, g in zip(offered, self.layout.groups, strict=True)
        ), f"{request_id}: the offer does not cover {num_tokens} tokens: {offered}"
        named = hashes[: num_tokens // self._block_size] if self._is_prefix_caching else ()
        hits = [self._hits(p, o.first, named) for p, o in zip(self.pools, offered, strict=True)]
        if not self._has_room_besides(hits, offered):
            return None
        blocks, pulls = [], []
        cached = end
        for pool, held, offer in zip(self.pools, hits, offered, strict=True):
            pool.hold(held.values())
            indexes = [i for i in range(offer.first, end) if i not in held]
            sources = [offer.block_ids[i - offer.first] for i in indexes]
            destinations = pool.allocate_like(run_lengths(sources))
            assert destinations is not None, (
                f"{request_id}: room for {len(sources)} blocks vanished"
            )
            held.update(zip(indexes, destinations, strict=True))
            blocks.append([NO_BLOCK] * offer.first + [held[i] for i in range(offer.first, end)])
            pulls.append(Pull(tuple(sources), tuple(destinations)))
            cached = min([cached, *indexes[:1]])
        self._admit(request_id, blocks, [offer.first for offer in offered], num_named=0)
        return Adoption(min(cached * self._block_size, num_tokens), tuple(pulls))

    # -------------------------------------------------------------------------------------- queries

    def tables(self, request_ids: Iterable[RequestId], max_tokens: int) -> tuple[Int32, ...]:
        """Return block tables wide enough for `max_tokens` tokens, [S, W] int32 per group, as a
        copy.

        Entries without a block are 0.
        """
        holdings = self._holdings
        rows = [holdings[request_id].row for request_id in request_ids]
        return self._tables.gather(rows, self.layout.num_blocks(max_tokens))

    def num_held(self, request_id: RequestId) -> tuple[int, ...]:
        """Return how many blocks the request holds, per group."""
        holding = self._holdings[request_id]
        return tuple(len(b) - s for b, s in zip(holding.blocks, holding.starts, strict=True))

    def num_runs(self, request_id: RequestId) -> tuple[int, ...]:
        """Return in how many runs of adjacent blocks the request lies, per group."""
        holding = self._holdings[request_id]
        held = zip(holding.blocks, holding.starts, strict=True)
        return tuple(len(run_lengths(blocks[start:])) for blocks, start in held)

    @property
    def num_requests(self) -> int:
        """Number of open requests."""
        return len(self._holdings)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Blocks without content, per group."""
        return tuple(pool.num_free for pool in self.pools)

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """Blocks kept for prefix hits alone, per group."""
        return tuple(pool.num_cached for pool in self.pools)

    @property
    def active_blocks(self) -> tuple[int, ...]:
        """Blocks that requests hold, per group."""
        return tuple(pool.num_active for pool in self.pools)

    def check(self) -> None:
        """Assert every invariant: pools balance, and reference counts are the number of
        holdings.
        """
        for index, pool in enumerate(self.pools):
            pool.check()
            counts = [0] * pool.num_blocks
            for request_id, holding in self._holdings.items():
                blocks, start = holding.blocks[index], holding.starts[index]
                assert not any(blocks[:start]), f"{request_id} remembers blocks it let go"
                for block_id in blocks[start:]:
                    counts[block_id] += 1
                row = self._tables.gather([holding.row], len(blocks))[index][0]
                assert row.tolist() == blocks, f"{request_id}: row {row} is not {blocks}"
            for number, count in enumerate(counts):
                holders = pool.num_holders(BlockId(number))
                assert holders == count, f"block {number}: {holders} holders, held {count} times"

    # ------------------------------------------------------------------------------------- internal

    def _usable_prefix(self, hashes: Sequence[BlockHash], limit: int) -> int:
        length, before = limit, -1
        for group, pool in zip(self.layout.groups, self.pools, strict=True):
            if not group.window:
                length = pool.prefix_cache.longest_prefix(hashes, length)
        # A shorter prefix may need blocks of another sliding group that the longer one did not:
        # until all agree.
        while length != before:
            before = length
            for group, pool in zip(self.layout.groups, self.pools, strict=True):
                if group.window:
                    length = pool.prefix_cache.longest_window(
                        hashes, length, partial(self._first_needed_of_blocks, group)
                    )
        return length

    def _hits(self, pool: BlockPool, first: int, hashes: Sequence[BlockHash]) -> dict[int, BlockId]:
        """Return the blocks that hold `hashes[first:]` here, by their entry in the block table."""
        found = {i: pool.prefix_cache.find(hashes[i]) for i in range(first, len(hashes))}
        return {i: block_id for i, block_id in found.items() if block_id is not None}

    def _has_room_besides(
        self, hits: Sequence[dict[int, BlockId]], offered: Sequence[GroupBlocks]
    ) -> bool:
        """Tell whether every group has blocks for what is offered and not hit, without evicting a
        hit.
        """
        for pool, held, offer in zip(self.pools, hits, offered, strict=True):
            num_idle_hits = sum(map(pool.prefix_cache.is_idle, held.values()))
            if len(offer.block_ids) - len(held) > pool.num_available - num_idle_hits:
                return False
        return True

    def _admit(
        self,
        request_id: RequestId,
        blocks: list[list[BlockId]],
        starts: list[int],
        num_named: int,
    ) -> None:
        holding = _Holding(self._tables.take_row(), blocks, starts, num_named)
        for index, (held, start) in enumerate(zip(blocks, starts, strict=True)):
            self._tables.write(index, holding.row, start, held[start:])
        self._update(holding)
        self._holdings[request_id] = holding

    def _missing(self, holding: _Holding, num_tokens: int) -> list[int]:
        wanted = self.layout.num_blocks(num_tokens)
        return [max(0, wanted - len(blocks)) for blocks in holding.blocks]

    def _has_room(self, counts: Sequence[int]) -> bool:
        return all(n <= pool.num_available for n, pool in zip(counts, self.pools, strict=True))

    def _extend(self, holding: _Holding, counts: Sequence[int]) -> bool:
        """Add `counts[g]` blocks to group g, or none to any."""
        if not self._has_room(counts):
            return False
        for index, (count, pool) in enumerate(zip(counts, self.pools, strict=True)):
            blocks = holding.blocks[index]
            if count:
                has_last = len(blocks) > holding.starts[index]
                added = pool.allocate(count, after=blocks[-1] if has_last else None)
                assert added is not None, f"room for {count} blocks vanished"
                self._tables.write(index, holding.row, len(blocks), added)
                blocks.extend(added)
        self._update(holding)
        return True

    def _name(self, holding: _Holding, hashes: Sequence[BlockHash], num_full: int) -> None:
        for index, (group, pool) in enumerate(zip(self.layout.groups, self.pools, strict=True)):
            blocks = holding.blocks[index]
            for i in range(max(holding.num_named, holding.starts[index]), num_full):
                # A prefix is found in a full group from its root, in a sliding group from its end.
                parent = hashes[i - 1] if i and not group.window else None
                pool.insert(blocks[i], hashes[i], parent)
        holding.num_named = max(holding.num_named, num_full)

    def _let_go_before(self, holding: _Holding, index: int, end: int) -> None:
        start, blocks = holding.starts[index], holding.blocks[index]
        if start < end:
            self.pools[index].release(blocks[start:end])
            blocks[start:end] = [NO_BLOCK] * (end - start)
            self._tables.clear(index, holding.row, start, end)
            holding.starts[index] = end

    def _update(self, holding: _Holding) -> None:
        """Derive `capacity` and `due` from what is held."""
        size = self._block_size
        holding.capacity = size * min(len(blocks) for blocks in holding.blocks)
        due = (holding.num_named + 1) * size if self._is_prefix_caching else NEVER
        for group, start in zip(self.layout.groups, holding.starts, strict=True):
            if group.window:
                due = min(due, (start + 1) * size + group.window - 1)
        holding.due = due

    def _first_needed_of_blocks(self, group: KVGroup, num_blocks: int) -> int:
        return self._first_needed(group, num_blocks * self._block_size)

    def _first_needed(self, group: KVGroup, num_tokens: int) -> int:
        return first_needed_block(group, num_tokens, self._block_size)


def first_needed_block(group: KVGroup, num_tokens: int, block_size: int) -> int:
    """Return the first entry of a block table that the token after `num_tokens` tokens looks at.

    A window of w tokens counts the token itself, so it reaches back w - 1 tokens.
    """
    if not group.window:
        return 0
    return max(0, num_tokens - group.window + 1) // block_size
