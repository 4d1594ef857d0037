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
        self._last: dict[BlockKey, tuple[int, int]] = {}
        """When each block was last used, and which kind it is."""
        self._ring: list[BlockKey] = []
        """The block of each of the last `size` ticks, at the tick modulo the size."""

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._last

    def __len__(self) -> int:
        return len(self._last)

    def use(self, key: BlockKey) -> None:
        """Note a use. O(log size)."""
        kind = 0
        if (before := self._last.get(key)) is not None:
            last, before_kind = before
            self._observe(before_kind, self._age(last), is_used=True)
            kind = AGAIN
        self._last[key] = self._tick, kind
        if self._tick < self._size:
            self._ring.append(key)
        else:
            place = self._tick % self._size
            self._forget(self._ring[place])
            self._ring[place] = key
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
        found = self._last.get(key)
        if found is None:
            return 0.0
        last, kind = found
        of = kind, self._age(last)
        if of not in self._chances:
            unused = 1.0
            for age in range(of[1], self._num_ages):
                used = self._used[kind][age] + self._prior_used
                unused *= 1 - used / (self._observed[kind][age] + PRIOR_WEIGHT)
            self._chances[of] = 1 - unused
        return self._chances[of]

    def _age(self, last: int) -> int:
        """Return in which doubling a block is that was used at that tick."""
        return min((self._tick - last).bit_length(), self._num_ages) - 1

    def _grow_older(self) -> None:
        """Count the blocks that have just lived through a doubling of age unused."""
        back, age, most = 2, 0, min(self._tick, self._size)
        while back <= most and age < self._num_ages:
            tick = self._tick - back
            last, kind = self._last.get(self._ring[tick % self._size], (-1, 0))
            if last == tick:
                self._observe(kind, age, is_used=False)
            back, age = 2 * back, age + 1

    def _forget(self, key: BlockKey) -> None:
        """Give up a block whose tick is over, if it has not been used since."""
        last, kind = self._last.get(key, (-1, 0))
        if last == self._tick - self._size:
            self._observe(kind, self._age(last), is_used=False)
            del self._last[key]

    def _observe(self, kind: int, age: int, *, is_used: bool) -> None:
        self._chances.clear()
        observed, used = self._observed[kind], self._used[kind]
        observed[age] += 1
        used[age] += is_used
        if observed[age] > OBSERVED_MAX:
            observed[age] /= 2
            used[age] /= 2
