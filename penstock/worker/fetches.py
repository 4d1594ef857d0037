"""`Fetches`: blocks on their way from tiers into the pool: reserved, read, compared, named.

Blocks are reserved for what a prefix lacks, under a name of their own, and one move per tier fills
them. Once all have landed, those whose digest is right get their names, up to the first that is
wrong: from then on the prefix cache has them like any others. So a move that fails or a block that
is wrong costs time and nothing else. What has not begun to move can be taken back.

What a sibling has (`worker/siblings.py`) is brought like what is ours; only that it may be gone
when it is read, which shows in the digest as well. What is brought, when and for whom is
`worker/onboard.py`'s to say, which calls this.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Move, MoveClass, MoveDone, SubmitMove, TierEnds
from penstock.core.tiers import KeptBlock
from penstock.core.types import BlockHash, BlockId, Digest, RequestId
from penstock.kv.cache import KVCache
from penstock.kv.compression import Direction
from penstock.transfer.plan import align
from penstock.worker.numbers import Numbers
from penstock.worker.shelf import Shelf
from penstock.worker.siblings import Siblings, SiblingShelf
from penstock.worker.traffic import Traffic

Place = Shelf | SiblingShelf


@dataclass(frozen=True, slots=True)
class Need:
    """What a prefix lacks in the pool: its entries from `first` on, and which tier has each."""

    hashes: list[BlockHash]
    first: int
    places: list[Place]


@dataclass(slots=True, eq=False)
class Fetch:
    """Entries `[first, first + len(block_ids))` of `hashes`, on their way.

    `holder` is the name under which the cache keeps them meanwhile, `last` what landed last; that
    move took `took_ns`, `codec_ns` of them for decoding.
    """

    holder: RequestId
    hashes: list[BlockHash]
    first: int
    block_ids: list[BlockId]
    last: Place
    move_ids: set[int] = field(default_factory=set)
    digests: dict[int, Digest] = field(default_factory=dict)
    took_ns: int = 0
    codec_ns: int = 0

    def decoding_ns(self, waited_ns: int) -> int:
        """Return how much of a wait for this went into decoding: copying and decoding take turns
        for as long as the last move takes, and before that is no decoding.
        """
        return min(waited_ns, self.took_ns) * self.codec_ns // max(1, self.took_ns)


@dataclass(slots=True, eq=False)
class _Read:
    """One move of a fetch: these entries, which were there when it was submitted."""

    fetch: Fetch
    place: Place
    entries: list[int]
    blocks: list[KeptBlock]


class Fetches:
    """Owns what is on its way up."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        shelves: Items[Shelf],
        siblings: Siblings,
        traffic: Traffic,
        move_ids: Numbers,
    ) -> None:
        self.active: list[Fetch] = []
        self._config = config
        self._kv = kv
        self._shelves = shelves
        self._siblings = siblings
        self._traffic = traffic
        self._move_ids = move_ids
        self._holders = Numbers()
        self._reads: dict[int, _Read] = {}
        self._commands: list[Command] = []

    @property
    def filling(self) -> list[BlockId]:
        """Blocks of the pool that are being filled."""
        return [block_id for fetch in self.active for block_id in fetch.block_ids]

    def need(self, hashes: list[BlockHash]) -> Need:
        """Return what of a prefix is not in the pool, as far as tiers have it."""
        first = self._kv.groups[0].pool.prefix_cache.longest_prefix(hashes, len(hashes))
        places: list[Place] = []
        for name in hashes[first:]:
            place = self._find(name)
            if place is None:
                break
            places.append(place)
        return Need(hashes, first, places)

    def under_way(self, name: BlockHash) -> Fetch | None:
        """Return the fetch that brings a block."""
        return next((f for f in self.active if name in f.hashes[f.first :]), None)

    def begin(
        self, need: Need, part: range, kind: MoveClass, deadline_ns: int, request_id: RequestId
    ) -> Fetch | None:
        """Have a part of what a need lacks brought; None when there is no room for it.

        A part that does not begin with the first missing block gets names all the same: what is
        before it is being computed meanwhile.
        """
        block_size = self._config.layout.block_size
        hashes, first = need.hashes[: need.first + part.stop], need.first
        if part.start:
            hashes, first = hashes[need.first + part.start :], 0
        holder = RequestId(f"onboard {self._holders.next()}")
        held = self._kv.open(holder, hashes, first * block_size)
        assert held == first * block_size, (held, first, block_size)
        if not self._kv.grow(holder, len(hashes) * block_size):
            self._kv.close(holder)
            return None
        (table,) = self._kv.tables([holder], len(hashes) * block_size)
        places = need.places[part.start : part.stop]
        block_ids = [BlockId(b) for b in table[0, first:].tolist()]
        fetch = Fetch(holder, hashes, first, block_ids, places[-1])
        self.active.append(fetch)
        for place in dict.fromkeys(places):
            entries = [first + i for i, where in enumerate(places) if where is place]
            move = self._read(fetch, place, entries, kind, request_id)
            self._commands.append(SubmitMove(move, deadline_ns))
        return fetch

    def take_commands(self) -> list[Command]:
        """Return the moves that are to be made."""
        commands, self._commands = self._commands, []
        return commands

    def promote(self, fetch: Fetch, now_ns: int) -> None:
        """Make what has not begun to move as urgent as what somebody waits for."""
        for move_id in fetch.move_ids:
            self._traffic.promote(move_id, MoveClass.ONBOARD, now_ns)

    def cancel(self, fetch: Fetch) -> bool:
        """Take back what has not begun to move; True when the fetch is over with that."""
        for move_id in [m for m in fetch.move_ids if self._traffic.cancel(m)]:
            read = self._reads.pop(move_id)
            read.place.books.num_reading -= len(read.entries)
            for block in read.blocks:
                read.place.release(block.name)
            fetch.move_ids.remove(move_id)
        return self._end(fetch)

    def is_ours(self, done: MoveDone) -> bool:
        """Tell whether it is a move of a fetch that has ended."""
        return done.move_id in self._reads

    def land(self, done: MoveDone) -> Fetch | None:
        """Take in the end of a move; return its fetch when that was the last."""
        read = self._reads.pop(done.move_id)
        self._take_in(read, done)
        read.fetch.move_ids.remove(done.move_id)
        read.fetch.last = read.place
        read.fetch.took_ns, read.fetch.codec_ns = done.finished_ns - done.started_ns, done.codec_ns
        return read.fetch if self._end(read.fetch) else None

    def _find(self, name: BlockHash) -> Place | None:
        for shelf in self._shelves:
            place = shelf if name in shelf else self._siblings.find(name, shelf.name)
            if place is not None:
                return place
        return None

    def _read(
        self,
        fetch: Fetch,
        place: Place,
        entries: list[int],
        kind: MoveClass,
        request_id: RequestId,
    ) -> Move:
        names = [fetch.hashes[entry] for entry in entries]
        blocks = [place.locate(name) for name in names]
        slots = [BlockId(block.slot) for block in blocks]
        place.hold(names)
        place.books.num_reading += len(names)
        move_id = self._move_ids.next()
        self._reads[move_id] = _Read(fetch, place, entries, blocks)
        fetch.move_ids.add(move_id)
        owner, epoch = self._config.worker_id, self._config.epoch
        if isinstance(place, SiblingShelf):
            owner, epoch = place.owner, place.epoch
        return Move(
            move_id=move_id,
            kind=kind,
            request_id=request_id,
            source=owner,
            epoch=epoch,
            spans=(tuple(align(slots, [fetch.block_ids[e - fetch.first] for e in entries])),),
            digests=(tuple(block.digest for block in blocks),),
            tiers=TierEnds(place.name, ""),
        )

    def _take_in(self, read: _Read, done: MoveDone) -> None:
        """Keep the digests that are right; a block that is wrong leaves its tier."""
        fetch, place, entries = read.fetch, read.place, read.entries
        place.books.num_reading -= len(entries)
        place.books.bytes_out += done.num_bytes
        place.books.raw_bytes_out += len(entries) * self._config.layout.block_bytes[0]
        if done.codec_ns:
            place.books.codec_books.note(Direction.DECODE, done.codec_ns, num_blocks=len(entries))
        landed: Items[Digest | None] = [None] * len(entries)
        if done.error is None:
            (landed,) = done.digests
        # The end of a prefix is touched first, hence given up first.
        for entry, block, found in reversed(list(zip(entries, read.blocks, landed, strict=True))):
            if found is not None and place.books.is_right(block, found):
                fetch.digests[entry] = found
                place.confirm(block.name)
            else:
                place.reject(block, is_read=found is not None)
            place.release(block.name)

    def _end(self, fetch: Fetch) -> bool:
        """Once all has landed, name the blocks that came right, as far as a prefix goes, and let
        them go.
        """
        if fetch.move_ids:
            return False
        self.active.remove(fetch)
        end = fetch.first
        while end in fetch.digests:
            end += 1
        pairs = [
            (fetch.block_ids[e - fetch.first], fetch.digests[e]) for e in range(fetch.first, end)
        ]
        self._kv.note_digests(0, pairs)
        self._kv.advance(fetch.holder, end * self._config.layout.block_size, fetch.hashes)
        self._kv.close(fetch.holder)
        return True
