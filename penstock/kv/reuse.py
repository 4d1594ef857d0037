"""How likely a block is to be used again, learnt from which were and which were not.

Every use of a named block is a tick. A block that was last used so many ticks ago either comes back
at some age or not within the history; for each doubling of age it is counted how many blocks lived
through it unused, and how many were used in it. The product over the ages that are still ahead is
the chance (Kaplan and Meier's estimate, which makes right use of blocks that are still young).
Blocks that were used once and those used more often are counted apart. Old experience fades, and
where there is none the chance is one half.

It remembers names, also of blocks that are nowhere any more: what was not kept and would have been
used is experience as well. `worker/tiers.py` asks whether a block is worth keeping.
Source: Kaplan and Meier, Nonparametric estimation from incomplete observations, JASA 1958.
"""

from dataclasses import dataclass
from typing import Final

from penstock.kv.tiers import BlockKey

CHANCE_UNKNOWN: Final = 0.5
"""Of a use within the whole history, before anything is known."""
PRIOR_WEIGHT: Final = 4.0
"""Observations of an age that weigh as much as knowing nothing of it."""
OBSERVED_MAX: Final = 8192
"""Experience with an age is halved when it is from so many blocks: what is older fades."""
AGAIN: Final = 1
"""The kind of blocks that were used more than once; those used once are kind 0."""


@dataclass(slots=True, eq=False)
class _Use:
    key: BlockKey
    tick: int
    kind: int


class ReuseHistory:
    """The last `size` uses, and what they say of the next."""

    def __init__(self, size: int) -> None:
        assert size > 0, size
        self._size = size
        self._num_ages = size.bit_length()
        prior = 1 - (1 - CHANCE_UNKNOWN) ** (1 / self._num_ages)
        self._prior_used = PRIOR_WEIGHT * prior
        self._observed = [[0.0] * self._num_ages for _ in (0, AGAIN)]
        self._used = [[0.0] * self._num_ages for _ in (0, AGAIN)]
        self._chances: dict[tuple[int, int], float] = {}
        """Of each kind and age, until something is learnt."""
        self._tick = 0
        self._last: dict[BlockKey, _Use] = {}
        """The last use of each block."""
        self._ring: list[_Use] = []
        """What was used at each of the last `size` ticks, at the tick modulo the size; where the
        block has been used since, its last use says another tick."""

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._last

    def __len__(self) -> int:
        return len(self._last)

    def use(self, key: BlockKey) -> None:
        """Note a use. O(log size)."""
        self._chances.clear()
        block = self._last.get(key)
        if block is None:
            block = self._last[key] = _Use(key, self._tick, 0)
        else:
            self._observe(block.kind, self._age(block.tick), is_used=True)
            block.tick, block.kind = self._tick, AGAIN
        if self._tick < self._size:
            self._ring.append(block)
        else:
            place = self._tick % self._size
            self._forget(self._ring[place])
            self._ring[place] = block
        self._tick += 1
        self._grow_older()

    def meet(self, key: BlockKey) -> None:
        """Note that a block is there whose first use is not known: now, if it is new."""
        if key not in self._last:
            self.use(key)

    def chance(self, key: BlockKey) -> float:
        """Return how likely a block is used again within the history, given its age; 0 of a block
        that is too old to be remembered. O(log size), O(1) until something is learnt.
        """
        block = self._last.get(key)
        if block is None:
            return 0.0
        of = kind, youngest = block.kind, self._age(block.tick)
        if of not in self._chances:
            unused = 1.0
            for age in range(youngest, self._num_ages):
                used = self._used[kind][age] + self._prior_used
                unused *= 1 - used / (self._observed[kind][age] + PRIOR_WEIGHT)
            self._chances[of] = 1 - unused
        return self._chances[of]

    def _age(self, last: int) -> int:
        """Return in which doubling a block is that was used at that tick."""
        return min((self._tick - last).bit_length(), self._num_ages) - 1

    def _grow_older(self) -> None:
        """Count the blocks that have just lived through a doubling of age unused, as `_observe`."""
        # A place before the ring's first is counted from its end, which is the place modulo size.
        ring, now, place = self._ring, self._tick, self._tick % self._size
        for age in range(min(self._tick, self._size).bit_length() - 1):
            back = 2 << age
            block = ring[place - back]
            if block.tick == now - back:
                observed = self._observed[block.kind]
                observed[age] += 1
                if observed[age] > OBSERVED_MAX:
                    self._fade(block.kind, age)

    def _forget(self, block: _Use) -> None:
        """Give up a block whose tick is over, if it has not been used since."""
        if block.tick == self._tick - self._size:
            self._observe(block.kind, self._age(block.tick), is_used=False)
            del self._last[block.key]

    def _observe(self, kind: int, age: int, *, is_used: bool) -> None:
        self._observed[kind][age] += 1
        self._used[kind][age] += is_used
        if self._observed[kind][age] > OBSERVED_MAX:
            self._fade(kind, age)

    def _fade(self, kind: int, age: int) -> None:
        self._observed[kind][age] /= 2
        self._used[kind][age] /= 2
