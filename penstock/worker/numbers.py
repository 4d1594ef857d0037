"""`Numbers`: what a worker numbers, whoever in it asks: moves, arrivals."""


class Numbers:
    """Counts from 1."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """Return a number that was not given before."""
        self._last += 1
        return self._last
