"""Looks for stop strings in text that arrives in pieces; what could become one is held back.

Owns the held text of one sequence. `choice.py` calls it.
"""

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that ends first; where two end together, the longer one.

    Where the pieces are cut makes no difference to what is found and what is let through.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert stops, "without stop strings there is nothing to look for"
        assert all(stops), stops
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Take a piece; return the text before any stop string, and the one found or None."""
        text = self._held + piece
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            self._held = ""
            return text[: found[1]], found[2]
        certain = min(self._first_candidate(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """Return what was held back and has become no stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _first_candidate(text: str, stop: str) -> int:
        """Return where the longest end of `text` that begins `stop` starts, or its length."""
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0:
            if stop.startswith(text[start:]):
                return start
            start = text.find(stop[0], start + 1)
        return len(text)
