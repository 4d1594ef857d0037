"""`Lines`: blocks that nobody holds any more and that are to be written to a tier, by warmth.

hot    to the nearest tier that takes it, at once
warm   the same, when the pool runs short or the worker is idle
cold   to the farthest, or a nearer one with room to spare, while the worker is idle; else dropped

Each line is in the order of being let go. It moves nothing: `worker/tiers.py` puts in and takes.
"""

from collections.abc import Iterable, Sequence

from penstock.core.types import BlockHash
from penstock.kv.policy import Temperature
from penstock.kv.tiers import Tier
from penstock.worker.keeping import Keeping
from penstock.worker.shelf import Shelf


class Lines:
    """Who waits to be written. A block that was declined counts at the tier that it was for."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._hot: dict[BlockHash, None] = {}
        self._warm: dict[BlockHash, None] = {}
        self._cold: dict[BlockHash, None] = {}

    def put(self, name: BlockHash, takers: Sequence[Shelf], *, is_idle: bool) -> None:
        """Queue a block for one of the tiers that take it, or decline it."""
        match self._keeping.temperature(name, takers[0].tier):
            case Temperature.HOT:
                self._hot[name] = None
            case Temperature.WARM:
                self._warm[name] = None
            case Temperature.COLD:
                place = roomy(takers)
                if is_idle and self._keeping.lower(name, Tier.HBM, [place.tier], is_idle=True):
                    self._cold[name] = None
                else:
                    takers[0].num_declined += 1

    def due(self, *, is_idle: bool, is_short: bool) -> tuple[dict[BlockHash, None], bool]:
        """Return the line that is to be written from now, and whether it is that of the cold."""
        if is_idle or is_short:
            self._hot.update(self._warm)
            self._warm.clear()
        if not is_idle:
            self._cold.clear()  # its time is over
        return (self._cold, True) if self._cold and not self._hot else (self._hot, False)


def roomy(takers: Iterable[Shelf]) -> Shelf:
    """Return the nearest of some tiers with room to spare, else the farthest."""
    place = None
    for place in takers:
        if place.num_free:
            break
    assert place is not None, "no tier takes it"
    return place
