"""`OutputLengths`: how many tokens an answer is likely to have, from those that were given.

A request says what it may have at most, which is often far more than it takes; room for that much
would leave pools half empty. Tokens count as they come, not when an answer is over: the short ones
are over first, and when answers become longer nobody would hear of it for as long as they take. The
mean is all tokens over all ends, which is right for any mix of what is over and what goes on when
an answer is as likely to end at one token as at another.
"""

from typing import Final

START_TOKENS: Final = 256
START_ENDS: Final = 4
"""Answers of that length that are taken for seen."""
MEMORY: Final = 200
"""Answers over which the mean is taken."""


class OutputLengths:
    """The mean length of late."""

    def __init__(self) -> None:
        self._num_tokens = float(START_TOKENS * START_ENDS)
        self._num_ends = float(START_ENDS)

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer."""
        return self._num_tokens / self._num_ends

    def note_tokens(self, num_tokens: int) -> None:
        """Take in tokens of answers that may go on."""
        self._num_tokens += num_tokens

    def note_end(self) -> None:
        """Take in that an answer is over, whose tokens were noted."""
        if self._num_ends >= MEMORY:
            self._num_tokens *= 1 - 1 / MEMORY
            self._num_ends *= 1 - 1 / MEMORY
        self._num_ends += 1

    def expect(self, max_tokens: int) -> int:
        """Return how many tokens to expect of a request that may have `max_tokens` more."""
        return max(1, min(max_tokens, round(self.mean_tokens)))
