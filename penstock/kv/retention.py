"""Which blocks are to be kept longer than their age says, by name, and until when.

Two strengths: *retained* (`retention_ttl` of the request that used them last) and *pinned*
(somebody asked for a prefix to stay). Both only order eviction: what nobody asked anything for goes
first, then what is retained, then what is pinned. Nothing is withheld from a request that runs, so
nobody can pin a worker away, and what may be asked for is a share of the pool: more is declined,
from the end of a prefix. Names may be of blocks that are not here, or not yet.

Also the worker's clock for idle blocks: it is told the time, and forgets what is over. Pools and
the shelves of tiers ask it (`strength`); the worker core tells it.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final

from penstock.core.types import BlockHash

RETAINED_SHARE: Final = 0.5
"""Of the pool's blocks that may be retained at any time."""
PINNED_SHARE: Final = 0.25
"""Of the pool's blocks that may be pinned at any time."""


class Retention:
    """Names with a time to live. `num_declined` counts blocks for which there was no share left."""

    def __init__(self, num_blocks: int) -> None:
        self.now_ns = 0
        self.num_declined = 0
        self._retained_max = int(RETAINED_SHARE * num_blocks)
        self._pinned_max = int(PINNED_SHARE * num_blocks)
        self._until: dict[BlockHash, int] = {}
        self._ends: list[tuple[int, BlockHash]] = []
        self._pins: dict[str, tuple[int, frozenset[BlockHash]]] = {}
        self._num_pins: Counter[BlockHash] = Counter()

    @property
    def is_empty(self) -> bool:
        """True while nothing is retained or pinned."""
        return not self._until and not self._pins

    @property
    def num_retained(self) -> int:
        """Names that are retained or pinned."""
        return len(self._until.keys() | self._num_pins.keys())

    def strength(self, name: BlockHash) -> int:
        """Return how much a block is wanted: 0, retained 1, pinned 2."""
        return 2 if name in self._num_pins else int(name in self._until)

    def remaining_ns(self, name: BlockHash) -> int:
        """Return how long a block is still to be kept; 0 when nobody asked for it. O(pins)."""
        ends = [until_ns for until_ns, names in self._pins.values() if name in names]
        return max(0, max([*ends, self._until.get(name, 0)]) - self.now_ns)

    def tell_time(self, now_ns: int) -> None:
        """Take the time, and forget what has lived long enough. O(1) while nothing has."""
        self.now_ns = now_ns
        while self._ends and self._ends[0][0] <= now_ns:
            until_ns, name = heappop(self._ends)
            if self._until.get(name) == until_ns:
                del self._until[name]
        if self._pins:
            for pin_id in [p for p, (until_ns, _) in self._pins.items() if until_ns <= now_ns]:
                self.unpin(pin_id)

    def retain(self, names: Sequence[BlockHash], until_ns: int) -> int:
        """Keep a prefix until then, or as long as it is kept already; return how many blocks."""
        for index, name in enumerate(names):
            before_ns = self._until.get(name)
            if before_ns is None and len(self._until) >= self._retained_max:
                self.num_declined += len(names) - index
                return index
            if before_ns is None or before_ns < until_ns:
                self._until[name] = until_ns
                heappush(self._ends, (until_ns, name))
        if len(self._ends) > 64 + 4 * len(self._until):  # most are of times that were put off
            self._ends = [(until_ns, name) for name, until_ns in self._until.items()]
            heapify(self._ends)
        return len(names)

    def pin(self, pin_id: str, names: Sequence[BlockHash], until_ns: int) -> int:
        """Keep a prefix before all others until then, or `unpin`; return how many blocks.

        The same pin again replaces what it was.
        """
        self.unpin(pin_id)
        room = self._pinned_max - len(self._num_pins)
        taken: list[BlockHash] = []
        for name in names:
            room -= name not in self._num_pins
            if room < 0:
                break
            taken.append(name)
        self.num_declined += len(names) - len(taken)
        if taken:
            self._pins[pin_id] = until_ns, frozenset(taken)
            self._num_pins.update(set(taken))
        return len(taken)

    def unpin(self, pin_id: str) -> None:
        """Keep a prefix no longer than others; an unknown pin is ignored."""
        _, names = self._pins.pop(pin_id, (0, frozenset()))
        self._num_pins.subtract(names)
        for name in names:
            if not self._num_pins[name]:
                del self._num_pins[name]

    def check(self) -> None:
        """Assert that shares are kept, and that pins and names agree."""
        assert len(self._until) <= self._retained_max, len(self._until)
        assert len(self._num_pins) <= self._pinned_max, len(self._num_pins)
        held = Counter(name for _, names in self._pins.values() for name in names)
        assert held == self._num_pins, (held, self._num_pins)
        assert {(u, n) for n, u in self._until.items()} <= set(self._ends)
