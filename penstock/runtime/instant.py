"""The instant executor: a modelled executor behind which no model runs.

It answers every step at once with tokens that are a hash of seed and position, which is what it
takes to measure all the rest: HTTP, tokeniser, controller, messages, worker cores, hand-offs.
Nothing that it generates means anything, and whoever serves with it is told so.
"""

from penstock.core.block import KVGroup, KVLayout
from penstock.core.step import Sampled, Step

DESCRIPTION = "NO MODEL RUNS: instant executor, every token is a hash of seed and position"
_MASK = (1 << 64) - 1


def instant_layout(block_size: int) -> KVLayout:
    """Return the smallest layout there is: 16 bytes per token, moved like any other."""
    return KVLayout("instant", (KVGroup((0,)),), 1, 2, block_size, "float32")


class InstantExecutor:
    """Samples from `[0, vocab_size)`, leaving out `avoided` (tokens that would end a text)."""

    def __init__(self, vocab_size: int, avoided: tuple[int, ...] = ()) -> None:
        self._vocab_size = vocab_size
        self._avoided = frozenset(avoided)

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        """Return a token for each of the step's samples."""
        return tuple(
            Sampled(self.token_at(sample.params.seed or 0, sample.position))
            for sample in step.samples
        )

    def token_at(self, seed: int, position: int) -> int:
        """Return the token that every worker gives at this position."""
        token_id = _mix(seed, position) % self._vocab_size
        while token_id in self._avoided:
            token_id = (token_id + 1) % self._vocab_size
        return token_id


def _mix(seed: int, position: int) -> int:
    """Hash two numbers (the finaliser of splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
