"""`OnboardDesk`: requests whose prefix lies in a tier wait while it is brought into the pool.

A request that is assigned comes here first. What its prefix lacks is brought (`worker/fetches.py`),
and then it goes to the scheduler, which finds the blocks in the prefix cache like any others. How
much is brought and how much computed after it is `kv/policy.py`'s, at the queues of this moment;
where no room can be made, nothing is. Several requests with the same prefix wait for one fetch. Out
of a tier that is about as slow as computing, the end of a prefix is brought while its front is
computed; nobody waits, and the scheduler skips what has come by then.

While others are before it, a request's blocks are a wish (`kv/prefetch.py`): to be there by its
turn. When that has come they are needed, and what it then waits is exposed time. A session that
pauses as it did before (`kv/sessions.py`) is wished for as well, as far as the pool has room to
spare. `worker/tiers.py` composes this.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, MoveClass, MoveDone
from penstock.core.tiers import PrefetchLoad
from penstock.core.types import NS_PER_S, BlockHash, BlockId, RequestId
from penstock.kv.cache import KVCache
from penstock.kv.policy import fetch_beside_computing, fetch_then_recompute
from penstock.kv.prefetch import PrefetchQueue
from penstock.kv.sessions import SessionHistory
from penstock.kv.tiers import BlockKey, Tier
from penstock.worker.costs import TierCosts
from penstock.worker.fetches import Fetch, Fetches, Need
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence, SequenceState
from penstock.worker.traffic import Traffic

NOBODY: Final = RequestId("")
FETCHES_MAX: Final = 4
"""Under way at once: their blocks are nobody's yet, and others want room too."""
HORIZON_NS: Final = NS_PER_S
"""A wish is not begun earlier than this before its deadline."""
BESIDE_SHARE: Final = 0.85
"""Of the time that bringing takes must suffice where both are done at once: it costs steps."""
SPARE_SHARE: Final = 0.5
"""Of the pool stays available when blocks are brought that nobody has asked for."""


@dataclass(slots=True, eq=False)
class _Wait:
    """Who waits for a fetch, since when, and since when it was the first one's turn; `wish` is what
    it was wished for by, `beside` who computes what is before it and waits for nothing.
    """

    fetch: Fetch
    wish: BlockKey | None
    waiting: list[tuple[Sequence, int]] = field(default_factory=list)
    needed_ns: int | None = None
    beside: Sequence | None = None

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody is there still whom it is for, or nobody ever was."""
        whom = [sequence for sequence, _ in self.waiting]
        whom += [] if self.beside is None else [self.beside]
        return not whom or any(map(_is_there, whom))


class OnboardDesk:
    """Owns the requests that wait for blocks, and the wishes."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        scheduler: Scheduler,
        fetches: Fetches,
        costs: TierCosts,
        traffic: Traffic,
    ) -> None:
        self.num_declined = 0
        """Requests that were quicker computed than brought."""
        self.prefetch = PrefetchQueue(depth=FETCHES_MAX, horizon_ns=HORIZON_NS)
        self._config = config
        self._pool = kv.groups[0].pool
        self._scheduler = scheduler
        self._fetches = fetches
        self._costs = costs
        self._traffic = traffic
        self._sessions = SessionHistory()
        self._waits: list[_Wait] = []
        self._line: dict[BlockKey, Sequence] = {}
        self._here: set[BlockHash] = set()
        """Sessions whose blocks were brought before anybody asked; none has gone on yet."""

    @property
    def filling(self) -> list[BlockId]:
        """Blocks of the pool that are being filled."""
        return self._fetches.filling

    def load(self) -> PrefetchLoad:
        """Return what came of the wishes so far."""
        books = self.prefetch.books
        return PrefetchLoad(
            num_used=books.used,
            num_late=books.late,
            num_missed=books.missed,
            num_wasted=books.wasted,
            num_dropped=books.dropped,
        )

    def add(self, sequence: Sequence, now_ns: int) -> None:
        """Send a new sequence to the scheduler, or have it wait for its prefix."""
        need = self._fetches.need(self._wanted(sequence))
        for place in need.places:
            place.books.num_wanted += 1
        self._visit(sequence.hashes, now_ns)
        if self._joins(sequence, need, now_ns):
            return
        if not self._part(need, may_compute=True):
            self.num_declined += bool(need.places)
            self._scheduler.add(sequence)
            return
        self._line[sequence.request_id] = sequence
        turn_ns = now_ns + int(self._costs.turn_ns(self._scheduler))
        self.prefetch.expect(sequence.request_id, turn_ns)

    def bring(self, now_ns: int) -> None:
        """Begin what it is time for: whose turn has come, then what is wished for."""
        for key in [key for key, sequence in self._line.items() if not _is_there(sequence)]:
            del self._line[key]
            self.prefetch.lose(key)
        for wait in [wait for wait in self._waits if not wait.is_wanted]:
            if self._fetches.cancel(wait.fetch):
                self._end(wait, now_ns)
        for tail in [tail for tail in self._here if self._pool.prefix_cache.find(tail) is None]:
            self._here.remove(tail)
            self.prefetch.lose(tail)
        self._notice_turns(now_ns)
        while len(self._waits) < FETCHES_MAX and (wish := self.prefetch.take(now_ns)):
            self._grant(*wish, now_ns)

    def take_commands(self) -> list[Command]:
        """Return the moves that are to be made."""
        return self._fetches.take_commands()

    def land(self, done: MoveDone, now_ns: int) -> bool:
        """Take in the end of a move; False when it is none of ours."""
        if not self._fetches.is_ours(done):
            return False
        fetch = self._fetches.land(done)
        if fetch is not None:
            (wait,) = [wait for wait in self._waits if wait.fetch is fetch]
            self._end(wait, now_ns)
        return True

    # ------------------------------------------------------------------------------ beginning

    def _wanted(self, sequence: Sequence) -> list[BlockHash]:
        """Return the names of the blocks that need not be computed here."""
        limit = sequence.target_tokens - (sequence.decode_worker is None)
        return sequence.hashes[: limit // self._config.layout.block_size]

    def _joins(self, sequence: Sequence, need: Need, now_ns: int) -> bool:
        """Have a sequence wait for a fetch that brings what it lacks, if there is one."""
        fetch = self._fetches.under_way(need.hashes[need.first]) if need.places else None
        for wait in self._waits:
            if wait.fetch is fetch:
                wait.waiting.append((sequence, now_ns))
                return True
        return False

    def _part(self, need: Need, *, may_compute: bool = False) -> range:
        """Return which of the blocks to bring: those after them are quicker computed, and where
        nothing else is to be, so may those before them be meanwhile.
        """
        tiers = [place.books.tier for place in need.places]
        total, recompute_ns = len(tiers), self._costs.recompute_ns

        def fetch_ns(some: list[Tier]) -> float:
            counts = Counter(some).items()
            return max((self._costs.fetch_ns(tier, count) for tier, count in counts), default=0.0)

        # Within a stretch of one tier all blocks cost the same: only its ends come in question.
        ends = [i for i in range(1, total) if tiers[i] is not tiers[i - 1]]
        cut = fetch_then_recompute(total, lambda n: fetch_ns(tiers[:n]), recompute_ns, ends=ends)
        if may_compute and not self._scheduler.running:
            both = fetch_beside_computing(total, lambda n: fetch_ns(tiers[-n:]), recompute_ns)
            if both.total_ns < BESIDE_SHARE * cut.total_ns:
                return range(total - both.num_fetched, total)
        return range(cut.num_fetched)

    def _visit(self, names: list[BlockHash], now_ns: int) -> None:
        """Learn when a session goes on, and wish for its blocks by then."""
        visit = self._sessions.visit(names, now_ns)
        if visit is None:
            return
        if visit.before is not None:
            self._here.discard(visit.before)
            self.prefetch.need(visit.before)
        if visit.due_ns is not None:
            self.prefetch.expect(visit.tail, visit.due_ns)

    def _notice_turns(self, now_ns: int) -> None:
        """Make urgent what is needed now: as many requests as have a seat, the oldest first."""
        if self._scheduler.waiting:
            return
        seats = self._config.max_num_seqs - len(self._scheduler.running)
        for wait in self._waits:
            count = sum(_is_there(sequence) for sequence, _ in wait.waiting)
            if count and seats > 0 and wait.needed_ns is None:
                wait.needed_ns = now_ns
                if wait.wish is not None:
                    self.prefetch.need(wait.wish)
                self._fetches.promote(wait.fetch, now_ns)
            seats -= count
        for key in list(self._line)[: max(0, seats)]:
            if len(self._waits) == FETCHES_MAX:
                self.prefetch.expect(key, now_ns)
                continue
            # It could not have been wished for any earlier, so it counts as no prefetch.
            self.prefetch.forget(key)
            self._begin(self._line.pop(key), None, now_ns, now_ns)

    def _grant(self, key: BlockKey, deadline_ns: int, now_ns: int) -> None:
        """Begin what was wished for, a request's blocks or a session's, if there is any left."""
        if key in self._line:
            self._begin(self._line.pop(key), key, deadline_ns, now_ns)
            return
        assert isinstance(key, bytes), key
        names = self._sessions.names(BlockHash(key))
        need = self._fetches.need(list(names))
        part = self._part(need)
        has_room = self._pool.num_available - len(part) >= SPARE_SHARE * self._pool.num_blocks
        is_new = not need.places or self._fetches.under_way(need.hashes[need.first]) is None
        fetch = None
        if part and has_room and is_new:
            kind = MoveClass.PREFETCH
            fetch = self._fetches.begin(need, part, kind, deadline_ns, NOBODY)
        if fetch is None:
            self.prefetch.forget(key)
        else:
            self._waits.append(_Wait(fetch, key))

    def _begin(
        self, sequence: Sequence, wish: BlockKey | None, deadline_ns: int, now_ns: int
    ) -> None:
        """Bring what a sequence lacks by now; without room for it, it is computed."""
        need = self._fetches.need(self._wanted(sequence))
        fetch = None
        joins = self._joins(sequence, need, now_ns)
        part = self._part(need, may_compute=wish is None)
        if part and not joins:
            kind = MoveClass.ONBOARD if wish is None else MoveClass.PREFETCH
            fetch = self._fetches.begin(need, part, kind, deadline_ns, sequence.request_id)
        if fetch is not None and part.start:
            sequence.coming_from = (need.first + part.start) * self._config.layout.block_size
            self._waits.append(_Wait(fetch, None, beside=sequence))
            self._scheduler.add(sequence)
            return
        if fetch is not None:
            needed_ns = now_ns if wish is None else None
            self._waits.append(_Wait(fetch, wish, [(sequence, now_ns)], needed_ns))
            return
        if wish is not None:
            self.prefetch.forget(wish)
        if not joins:
            self._scheduler.add(sequence)

    # ------------------------------------------------------------------------------ ending

    def _end(self, wait: _Wait, now_ns: int) -> None:
        """Send who waited to the scheduler; book exposed time, and what came of the wish."""
        self._waits.remove(wait)
        if wait.wish is not None:
            self._book(wait, wait.wish)
        if wait.beside is not None:
            wait.beside.coming_from = None
        books = wait.fetch.last.books
        for sequence, since_ns in wait.waiting:
            if not _is_there(sequence):
                continue
            if wait.needed_ns is not None:
                waited_ns = now_ns - max(since_ns, wait.needed_ns)
                # What is waited for in the end is the last tier's doing.
                decoding_ns = wait.fetch.decoding_ns(waited_ns)
                sequence.timeline.exposed_ns += waited_ns
                sequence.timeline.exposed_decode_ns += decoding_ns
                books.exposed_ns += waited_ns
                books.codec_books.expose(decoding_ns)
                self._traffic.expose((books.tier, Tier.HBM), waited_ns - decoding_ns)
            self._scheduler.add(sequence)

    def _book(self, wait: _Wait, wish: BlockKey) -> None:
        self.prefetch.arrive(wish)
        if not wait.is_wanted:
            self.prefetch.lose(wish)
        elif wait.waiting:
            self.prefetch.need(wish)
        else:
            assert isinstance(wish, bytes), wish
            self._here.add(BlockHash(wish))


def _is_there(sequence: Sequence) -> bool:
    """Tell whether a request is still wanted."""
    return sequence.state is not SequenceState.GONE
