"""`Write`: blocks on their way down, out of the pool or out of one tier into another.

What was known of them when the move was submitted, and by what they are known when it has landed.
`worker/tiers.py` keeps one for each such move.
"""

from dataclasses import dataclass

from penstock.core.events import MoveDone
from penstock.core.types import BlockHash, BlockId, Digest
from penstock.worker.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Write:
    """Blocks on their way down: out of the pool (`generations` as they were) or another shelf."""

    names: list[BlockHash]
    digests: tuple[Digest, ...]
    into: Shelf
    out_of: Shelf | None = None
    block_ids: tuple[BlockId, ...] = ()
    generations: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    """Which of them is at which place in the move."""

    def landed(self, done: MoveDone) -> dict[BlockHash, Digest]:
        """Return by what each is known now; not by its content where a codec is between."""
        known = dict(zip(self.names, self.digests, strict=True))
        if done.error is None and done.digests:
            known.update(zip((self.names[i] for i in self.order), done.digests[0], strict=True))
        return known
