"""`OutputLengths`: how many tokens an answer is likely to have, from those that were given.

A request says what it may have at most, which is often far more than it takes; room for that much
would leave pools half empty.
"""

from typing import Final

START_TOKENS: Final = 256
MEMORY: Final = 200
"""Answers over which the mean is taken."""


class OutputLengths:
    """The mean length of late."""

    def __init__(self) -> None:
        self.mean_tokens = float(START_TOKENS)
        self._num_seen = 0

    def note(self, num_tokens: int) -> None:
        """Take in an answer that is over."""
        self._num_seen += 1
        # The start counts as a few answers.
        self.mean_tokens += (num_tokens - self.mean_tokens) / min(self._num_seen + 4, MEMORY)

    def expect(self, max_tokens: int) -> int:
        """Return how many tokens to expect of a request that may have `max_tokens` more."""
        return max(1, min(max_tokens, round(self.mean_tokens)))
