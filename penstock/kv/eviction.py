"""In which order a tier gives blocks up: LRU, ARC-like, or by cost.

An order knows the blocks of one tier and nothing else: recency, frequency, ghosts of what it gave
up lately, worth. Orchestrator and workers keep one a tier; `penstock/sim/reuse.py` compares them on
traces. `victim` names a block and changes nothing; `remove(evicted=True)` says that it went.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Final, Protocol

from penstock.kv.tiers import BlockKey

CanEvict = Callable[[BlockKey], bool]
STALE_MAX: Final = 4
"""A heap is rebuilt when it has this many times more entries than blocks."""


class EvictionOrder(Protocol):
    """What the three have in common. `worth` is the ns that a hit saves."""

    def insert(self, key: BlockKey, worth: float) -> None:
        """Take a block in as just used."""

    def touch(self, key: BlockKey) -> None:
        """Note a use of a block that is in."""

    def victim(self, can_evict: CanEvict) -> BlockKey | None:
        """Return what to give up first among those that may be."""

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        """Take a block out; `evicted` when it is given up for room."""


class LruOrder:
    """The one whose last use is longest ago."""

    def __init__(self) -> None:
        self._keys: OrderedDict[BlockKey, None] = OrderedDict()

    def insert(self, key: BlockKey, worth: float) -> None:
        """Take a block in as just used; `worth` does not matter here."""
        assert key not in self._keys, f"{key!r} is in already"
        self._keys[key] = None

    def touch(self, key: BlockKey) -> None:
        """Make it the latest."""
        self._keys.move_to_end(key)

    def victim(self, can_evict: CanEvict) -> BlockKey | None:
        """Return the oldest that may go."""
        return next(filter(can_evict, self._keys), None)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        """Take it out."""
        del self._keys[key]


class ArcOrder:
    """Balances blocks used once against blocks used again, by the ghosts of what it gave up.

    A ghost that comes back says that its list is too short. Ghosts are as many as blocks, so the
    size of the tier need not be known and may vary: hence ARC-*like*.
    Source: Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003.
    """

    def __init__(self) -> None:
        self._once: OrderedDict[BlockKey, None] = OrderedDict()
        self._again: OrderedDict[BlockKey, None] = OrderedDict()
        self._once_ghosts: OrderedDict[BlockKey, None] = OrderedDict()
        self._again_ghosts: OrderedDict[BlockKey, None] = OrderedDict()
        self._once_target = 0.0

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def insert(self, key: BlockKey, worth: float) -> None:
        """Take a block in: among those used again when its ghost is here."""
        assert key not in self._once, f"{key!r} is in already"
        assert key not in self._again, f"{key!r} is in already"
        num_once, num_again = len(self._once_ghosts), len(self._again_ghosts)
        if key in self._once_ghosts:
            step = max(1.0, num_again / num_once)
            self._once_target = min(len(self) + 1.0, self._once_target + step)
            del self._once_ghosts[key]
            self._again[key] = None
        elif key in self._again_ghosts:
            step = max(1.0, num_once / num_again)
            self._once_target = max(0.0, self._once_target - step)
            del self._again_ghosts[key]
            self._again[key] = None
        else:
            self._once[key] = None

    def touch(self, key: BlockKey) -> None:
        """Make it the latest of those used again."""
        self._once.pop(key, None)
        self._again[key] = None
        self._again.move_to_end(key)

    def victim(self, can_evict: CanEvict) -> BlockKey | None:
        """Return the oldest of the list that is longer than it should be."""
        lists = [self._once, self._again]
        if len(self._once) <= self._once_target:
            lists.reverse()
        return next((key for keys in lists for key in keys if can_evict(key)), None)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        """Take it out; what is evicted leaves a ghost."""
        is_once = key in self._once
        del (self._once if is_once else self._again)[key]
        if not evicted:
            return
        ghosts = self._once_ghosts if is_once else self._again_ghosts
        ghosts[key] = None
        while len(ghosts) > max(1, len(self)):
            ghosts.popitem(last=False)


class CostOrder:
    """The one whose uses so far, times what a hit saves, are worth least; age counts by inflation.

    Every block of a tier takes about the same room, so size is left out.
    Source: Cherkasova, Greedy-Dual-Size-Frequency, HP Labs HPL-98-69R1.
    """

    def __init__(self) -> None:
        self._priorities: dict[BlockKey, float] = {}
        self._uses: dict[BlockKey, int] = {}
        self._worth: dict[BlockKey, float] = {}
        self._heap: list[tuple[float, int, BlockKey]] = []
        self._num_pushed = 0
        self._inflation = 0.0

    def insert(self, key: BlockKey, worth: float) -> None:
        """Take a block in."""
        assert key not in self._priorities, f"{key!r} is in already"
        self._uses[key] = 0
        self._worth[key] = worth
        self.touch(key)

    def touch(self, key: BlockKey) -> None:
        """Count a use."""
        self._uses[key] += 1
        self._priorities[key] = self._inflation + self._uses[key] * self._worth[key]
        self._push(key)

    def victim(self, can_evict: CanEvict) -> BlockKey | None:
        """Return the one of least priority that may go. Amortised O(log blocks)."""
        held: list[BlockKey] = []
        found = None
        while self._heap and found is None:
            priority, _, key = self._heap[0]
            if self._priorities.get(key) != priority:
                heappop(self._heap)
            elif can_evict(key):
                found = key
            else:
                heappop(self._heap)
                held.append(key)
        for key in held:
            self._push(key)
        return found

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        """Take it out; what is evicted sets the level from which new blocks start."""
        priority = self._priorities.pop(key)
        if evicted:
            self._inflation = max(self._inflation, priority)
        del self._uses[key], self._worth[key]

    def _push(self, key: BlockKey) -> None:
        if len(self._heap) > 64 + STALE_MAX * len(self._priorities):
            self._heap = [
                (self._priorities[k], i, k) for i, k in enumerate(dict.fromkeys(self._priorities))
            ]
            heapify(self._heap)
            self._num_pushed = max(self._num_pushed, len(self._heap))
        self._num_pushed += 1
        heappush(self._heap, (self._priorities[key], self._num_pushed, key))


def last_of_retained(
    order: EvictionOrder, can_evict: CanEvict, is_retained: CanEvict
) -> BlockKey | None:
    """Return what goes first; a block that is to be retained only when there is no other."""
    victim = order.victim(can_evict)
    if victim is None or not is_retained(victim):
        return victim
    other = order.victim(lambda key: can_evict(key) and not is_retained(key))
    return victim if other is None else other


ORDERS: Final[dict[str, Callable[[], EvictionOrder]]] = {
    "lru": LruOrder,
    "arc": ArcOrder,
    "cost": CostOrder,
}


def make_order(name: str, blocks: Iterable[BlockKey] = (), worth: float = 1.0) -> EvictionOrder:
    """Return an order by name, with blocks that are in already. Raises: `KeyError`."""
    order = ORDERS[name]()
    for key in blocks:
        order.insert(key, worth)
    return order
