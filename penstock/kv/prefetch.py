"""Prefetch queue: what to bring before which moment, and whether it was worth it.

Wishes come from whoever can see ahead (the router's assignment, the waiting queue, the history of
a session, the next step of a simulation), each with the moment by which the block is needed. Few
are under way at a time: what is brought too early takes room from what is needed now.

Every wish has one outcome: *used* (it was there in time), *late* (it was on its way when it was
needed), *missed* (it was needed before it was started), *wasted* (brought and never used), or
*dropped* (withdrawn before it was started). Called by `kv/orchestrator.py`, which moves the blocks.
"""

from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from typing import Final

from penstock.kv.tiers import BlockKey

WISHES_MAX: Final = 1 << 17


class WishState(Enum):
    """WISHED -> COMING -> HERE -> gone."""

    WISHED = "wished"
    COMING = "coming"
    HERE = "here"


@dataclass(slots=True)
class PrefetchBooks:
    """Outcomes so far."""

    used: int = 0
    late: int = 0
    missed: int = 0
    wasted: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Wish:
    state: WishState
    deadline_ns: int


class PrefetchQueue:
    """Wishes by deadline; at most `depth` of them coming, none further ahead than `horizon_ns`."""

    def __init__(self, *, depth: int, horizon_ns: int) -> None:
        self.books = PrefetchBooks()
        self._depth = depth
        self._horizon_ns = horizon_ns
        self._wishes: dict[BlockKey, _Wish] = {}
        self._heap: list[tuple[int, int, BlockKey]] = []
        self._num_wishes = 0
        self._num_coming = 0

    def __len__(self) -> int:
        return len(self._wishes)

    def expect(self, key: BlockKey, deadline_ns: int) -> bool:
        """Wish for a block; the earlier deadline counts. False when the queue is full."""
        wish = self._wishes.get(key)
        if wish is None:
            if len(self._wishes) >= WISHES_MAX:
                return False
            wish = self._wishes[key] = _Wish(WishState.WISHED, deadline_ns)
        elif wish.deadline_ns <= deadline_ns:
            return True
        wish.deadline_ns = deadline_ns
        if wish.state is WishState.WISHED:
            self._push(key, deadline_ns)
        return True

    def take(self, now_ns: int) -> tuple[BlockKey, int] | None:
        """Return the next block to bring and its deadline, if one is due; it counts as coming."""
        while self._heap and self._num_coming < self._depth:
            deadline_ns, _, key = self._heap[0]
            if deadline_ns - now_ns > self._horizon_ns:
                return None
            heappop(self._heap)
            wish = self._wishes.get(key)
            if wish and wish.state is WishState.WISHED and wish.deadline_ns == deadline_ns:
                wish.state = WishState.COMING
                self._num_coming += 1
                return key, deadline_ns
        return None

    def put_back(self, key: BlockKey) -> None:
        """Undo a `take`: there is no room, or nothing to bring from, at this moment."""
        wish = self._wishes[key]
        assert wish.state is WishState.COMING, f"{key!r} is {wish.state.value}"
        wish.state = WishState.WISHED
        self._num_coming -= 1
        self._push(key, wish.deadline_ns)

    def arrive(self, key: BlockKey) -> None:
        """Note that a block is there, whether or not it was wished for."""
        wish = self._wishes.get(key)
        if wish and wish.state is WishState.COMING:
            self._num_coming -= 1
            wish.state = WishState.HERE

    def need(self, key: BlockKey) -> None:
        """Book the outcome of a block that is needed now."""
        match self._forget(key):
            case WishState.HERE:
                self.books.used += 1
            case WishState.COMING:
                self.books.late += 1
            case WishState.WISHED:
                self.books.missed += 1
            case None:
                pass

    def lose(self, key: BlockKey) -> None:
        """Book the outcome of a block that was withdrawn, evicted, or failed to come."""
        match self._forget(key):
            case WishState.HERE | WishState.COMING:
                self.books.wasted += 1
            case WishState.WISHED:
                self.books.dropped += 1
            case None:
                pass

    def forget(self, key: BlockKey) -> None:
        """Drop a wish that turned out to be none: nothing is booked."""
        self._forget(key)

    def next_ns(self) -> int | None:
        """Return when the next wish is due to be begun; None when none waits."""
        while self._heap:
            deadline_ns, _, key = self._heap[0]
            if self._is_waiting(key, deadline_ns):
                return deadline_ns - self._horizon_ns
            heappop(self._heap)
        return None

    def _is_waiting(self, key: BlockKey, deadline_ns: int) -> bool:
        wish = self._wishes.get(key)
        if wish is None or wish.state is not WishState.WISHED:
            return False
        return wish.deadline_ns == deadline_ns

    def _push(self, key: BlockKey, deadline_ns: int) -> None:
        self._num_wishes += 1
        heappush(self._heap, (deadline_ns, self._num_wishes, key))

    def _forget(self, key: BlockKey) -> WishState | None:
        wish = self._wishes.pop(key, None)
        if wish is None:
            return None
        self._num_coming -= wish.state is WishState.COMING
        return wish.state
