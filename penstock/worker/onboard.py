"""`OnboardDesk`: requests whose prefix lies in a tier wait while it is brought into the pool.

A request that is assigned comes here first. What its prefix has in the pool is held, blocks are
reserved for what comes next in the tiers, and one move per tier fills them. Once all have landed,
blocks whose digest is right get their names, up to the first that is wrong, and the request goes to
the scheduler, which finds them in the prefix cache like any others. So a move that fails, a block
that is wrong, or a request that is cancelled meanwhile, costs time and nothing else.

What a sibling has (`worker/siblings.py`) is brought like what is ours; only that it may be gone
when it is read, which shows in the digest as well. Where computing is predicted to be as quick, or
no room can be made, nothing is brought. Several requests with the same prefix wait for one move.
`worker/tiers.py` composes this.
"""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Move, MoveClass, MoveDone, SubmitMove, TierEnds
from penstock.core.tiers import KeptBlock
from penstock.core.types import BlockHash, BlockId, Digest, RequestId
from penstock.kv.cache import KVCache
from penstock.transfer.plan import align
from penstock.worker.numbers import Numbers
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence, SequenceState
from penstock.worker.shelf import Shelf
from penstock.worker.siblings import Siblings, SiblingShelf

Place = Shelf | SiblingShelf

FETCHES_MAX: Final = 4
"""Under way at once: their blocks are nobody's yet, and others want room too."""
STEP_WEIGHT: Final = 0.2
PREFILL_TOKENS_MIN: Final = 16
"""Steps of fewer tokens say little about what a prompt costs."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """Blocks on their way: entries `[first, first + len(block_ids))` of `hashes`.

    `holder` is the name under which the cache keeps them meanwhile.
    """

    holder: RequestId
    hashes: list[BlockHash]
    first: int
    block_ids: list[BlockId]
    started_ns: int
    sequences: list[Sequence]
    num_moves: int = 0
    digests: dict[int, Digest] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Read:
    """One move of a fetch: these entries, which were there when it was submitted."""

    fetch: _Fetch
    place: Place
    entries: list[int]
    blocks: list[KeptBlock]


class OnboardDesk:
    """Owns what is on its way up, and the requests that wait for it."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        scheduler: Scheduler,
        shelves: Items[Shelf],
        siblings: Siblings,
        move_ids: Numbers,
    ) -> None:
        self.num_declined = 0
        """Requests that were quicker computed than brought."""
        self._config = config
        self._kv = kv
        self._scheduler = scheduler
        self._shelves = shelves
        self._siblings = siblings
        self._move_ids = move_ids
        self._holders = Numbers()
        self._fetches: list[_Fetch] = []
        self._reads: dict[int, _Read] = {}
        self._line: deque[Sequence] = deque()
        self._commands: list[Command] = []
        self._token_ns: float | None = None

    @property
    def num_fetches(self) -> int:
        """Fetches under way; each holds blocks of the pool."""
        return len(self._fetches)

    @property
    def filling(self) -> list[BlockId]:
        """Blocks of the pool that are being filled."""
        return [block_id for fetch in self._fetches for block_id in fetch.block_ids]

    def add(self, sequence: Sequence, now_ns: int) -> None:
        """Send a new sequence to the scheduler, at once or when its prefix is there."""
        if self._is_up_to_scheduler(sequence, now_ns):
            self._scheduler.add(sequence)

    def take_commands(self) -> list[Command]:
        """Return the moves that are to be made."""
        commands, self._commands = self._commands, []
        return commands

    def note_step(self, num_tokens: int, took_ns: int) -> None:
        """Remember what computing costs; a step that took no time was computed by nobody."""
        if num_tokens < PREFILL_TOKENS_MIN or not took_ns:
            return
        per_token = took_ns / num_tokens
        if self._token_ns is None:
            self._token_ns = per_token
        self._token_ns += STEP_WEIGHT * (per_token - self._token_ns)

    def land(self, done: MoveDone, now_ns: int) -> bool:
        """Take in the end of a move; False when it is none of ours."""
        read = self._reads.pop(done.move_id, None)
        if read is None:
            return False
        self._take_in(read, done)
        fetch = read.fetch
        fetch.num_moves -= 1
        if not fetch.num_moves:
            self._finish(fetch)
            waited = [s for s in fetch.sequences if s.state is not SequenceState.GONE]
            # What the requests waited for in the end is the last tier's doing.
            read.place.books.exposed_ns += len(waited) * (now_ns - fetch.started_ns)
            for sequence in waited:
                self._scheduler.add(sequence)
            line, self._line = self._line, deque()
            for sequence in line:
                if sequence.state is not SequenceState.GONE:
                    self.add(sequence, now_ns)
        return True

    # ------------------------------------------------------------------------------ beginning

    def _is_up_to_scheduler(self, sequence: Sequence, now_ns: int) -> bool:
        """Begin to bring what a sequence's prefix lacks, or queue for that; True: neither."""
        block_size = self._config.layout.block_size
        sequence.name_blocks(block_size)
        limit = sequence.target_tokens - (sequence.decode_worker is None)
        hashes = sequence.hashes[: limit // block_size]
        pool = self._kv.groups[0].pool
        first = pool.prefix_cache.longest_prefix(hashes, len(hashes))
        places = self._places(hashes, first)
        if not places:
            return True
        for fetch in self._fetches:
            if hashes[first] in fetch.hashes[fetch.first :]:
                fetch.sequences.append(sequence)
                return False
        if not self._is_worthwhile(places):
            self.num_declined += 1
            return True
        if len(self._fetches) < FETCHES_MAX and self._begin(
            sequence, hashes, first, places, now_ns
        ):
            return False
        if self._fetches:
            self._line.append(sequence)
            return False
        return True

    def _places(self, hashes: list[BlockHash], first: int) -> list[Place]:
        """Return the nearest shelf of each block from `first` on, as far as there is one."""
        places = []
        for name in hashes[first:]:
            place = self._place(name)
            if place is None:
                break
            places.append(place)
        return places

    def _place(self, name: BlockHash) -> Place | None:
        for shelf in self._shelves:
            place = shelf if name in shelf else self._siblings.find(name, shelf.name)
            if place is not None:
                return place
        return None

    def _is_worthwhile(self, places: list[Place]) -> bool:
        """Compare the slowest tier with computing; before the first step nothing is known."""
        if self._token_ns is None:
            return True
        compute_ns = len(places) * self._config.layout.block_size * self._token_ns
        return all(p.books.fetch_ns(places.count(p)) < compute_ns for p in dict.fromkeys(places))

    def _begin(
        self,
        sequence: Sequence,
        hashes: list[BlockHash],
        first: int,
        places: list[Place],
        now_ns: int,
    ) -> bool:
        """Reserve blocks and have them filled, a move per tier; False when there is no room."""
        block_size = self._config.layout.block_size
        num_tokens = (first + len(places)) * block_size
        holder = RequestId(f"onboard {self._holders.next()}")
        held = self._kv.open(holder, hashes, first * block_size)
        assert held == first * block_size, (held, first, block_size)
        if not self._kv.grow(holder, num_tokens):
            self._kv.close(holder)
            return False
        (table,) = self._kv.tables([holder], num_tokens)
        block_ids = [BlockId(b) for b in table[0, first:].tolist()]
        fetch = _Fetch(holder, hashes[: first + len(places)], first, block_ids, now_ns, [sequence])
        self._fetches.append(fetch)
        for place in dict.fromkeys(places):
            entries = [first + i for i, where in enumerate(places) if where is place]
            self._commands.append(self._read(fetch, place, entries))
        return True

    def _read(self, fetch: _Fetch, place: Place, entries: list[int]) -> Command:
        names = [fetch.hashes[entry] for entry in entries]
        blocks = [place.locate(name) for name in names]
        slots = [BlockId(block.slot) for block in blocks]
        place.hold(names)
        place.books.begin_read(len(names))
        move_id = self._move_ids.next()
        self._reads[move_id] = _Read(fetch, place, entries, blocks)
        fetch.num_moves += 1
        owner, epoch = self._config.worker_id, self._config.epoch
        if isinstance(place, SiblingShelf):
            owner, epoch = place.owner, place.epoch
        move = Move(
            move_id=move_id,
            kind=MoveClass.ONBOARD,
            request_id=fetch.sequences[0].request_id,
            source=owner,
            epoch=epoch,
            spans=(tuple(align(slots, [fetch.block_ids[e - fetch.first] for e in entries])),),
            digests=(tuple(block.digest for block in blocks),),
            tiers=TierEnds(place.name, ""),
        )
        return SubmitMove(move)

    # ------------------------------------------------------------------------------ landing

    def _take_in(self, read: _Read, done: MoveDone) -> None:
        """Keep the digests that are right; a block that is wrong leaves its tier."""
        fetch, place, entries = read.fetch, read.place, read.entries
        place.books.end_read(len(entries), done.finished_ns - done.started_ns)
        place.books.bytes_out += done.num_bytes
        place.books.raw_bytes_out += len(entries) * self._config.layout.block_bytes[0]
        place.books.decode_ns += done.codec_ns
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

    def _finish(self, fetch: _Fetch) -> None:
        """Give names to the blocks that came right, as far as a prefix goes, and let them go."""
        self._fetches.remove(fetch)
        end = fetch.first
        while end in fetch.digests:
            end += 1
        pairs = [
            (fetch.block_ids[e - fetch.first], fetch.digests[e]) for e in range(fetch.first, end)
        ]
        self._kv.note_digests(0, pairs)
        self._kv.advance(fetch.holder, end * self._config.layout.block_size, fetch.hashes)
        self._kv.close(fetch.holder)
