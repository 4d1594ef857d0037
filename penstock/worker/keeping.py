"""`Keeping`: which blocks are worth keeping below a worker's pool, and where.

Brings together how likely a block is to be used again (`kv/reuse.py`), what was asked to be kept
(`kv/retention.py`) and what things cost at this moment (`worker/costs.py`); the rules themselves
are `kv/policy.py`'s. `worker/tiers.py` asks, and tells of uses.
"""

from collections.abc import Iterable

from penstock.core.types import BlockHash
from penstock.kv.policy import Option, WriteMode, choose_tier, write_mode
from penstock.kv.residency import Residency
from penstock.kv.retention import Retention
from penstock.kv.reuse import ReuseHistory
from penstock.kv.tiers import Tier
from penstock.worker.costs import TierCosts


class Keeping:
    """With `is_idle` writing costs nothing: nobody else wants link or processor."""

    def __init__(
        self,
        history: ReuseHistory,
        retention: Retention,
        costs: TierCosts,
        residency: Residency,
    ) -> None:
        self.history = history
        self._retention = retention
        self._costs = costs
        self._residency = residency

    def mode(self, name: BlockHash, into: Tier, *, is_idle: bool) -> WriteMode:
        """Return when a block of the pool is to be written to a tier."""
        costs = self._costs
        return write_mode(
            self._expected_uses(name),
            save_ns=costs.recompute_ns(1) - costs.move_ns(into, Tier.HBM),
            write_ns=0.0 if is_idle else costs.move_ns(Tier.HBM, into),
        )

    def lower(
        self, name: BlockHash, above: Tier, below: Iterable[Tier], *, is_idle: bool
    ) -> Tier | None:
        """Return to which of the tiers below a block is to sink; None: to none, it is dropped."""
        costs = self._costs
        options = [
            Option(
                tier,
                costs.move_ns(tier, Tier.HBM),
                0.0 if is_idle else costs.move_ns(above, tier),
                self._residency.capacity_bytes[tier],  # it will make room
            )
            for tier in below
        ]
        return choose_tier(
            options,
            recompute_ns=costs.recompute_ns(1),
            expected_uses=self._expected_uses(name),
            num_bytes=costs.block_bytes,
        )

    def _expected_uses(self, name: BlockHash) -> float:
        """Return how often a block will be used again, once at most; what was asked for surely."""
        return 1.0 if self._retention.strength(name) else self.history.chance(name)
