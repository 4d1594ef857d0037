"""`Stretches`: values drawn from what was seen, in stretches as they had followed each other.

What makes a step or a message slow is often still there at the next: drawn one by one, slow ones
would come evenly, and a request of many steps would never meet a bad time. So a place is drawn, and
the values from there on are given out, round the end, until the stretch is over.

Called by the executor and the fabric of a calibrated simulation.

Source: the circular block bootstrap (Politis and Romano, 1992).
"""

import random
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")
STRETCH: Final = 128


class Stretches(Generic[Value]):
    """Draws for ever from `seen`, which is in order of time and has at least one value."""

    def __init__(self, seen: Sequence[Value], rng: random.Random) -> None:
        assert seen, "there is nothing to draw from"
        self._seen = seen
        self._rng = rng
        self._at = 0
        self._left = 0

    def draw(self) -> Value:
        """Return the next value."""
        if not self._left:
            self._at, self._left = self._rng.randrange(len(self._seen)), STRETCH
        value = self._seen[self._at]
        self._at, self._left = (self._at + 1) % len(self._seen), self._left - 1
        return value
