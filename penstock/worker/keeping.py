"""`Keeping`: how warm blocks are, and where those that a tier gives up are worth keeping.

Brings together how likely a block is to be used again (`kv/reuse.py`), what was asked to be kept
(`kv/retention.py`) and what things cost at this moment (`worker/costs.py`); the rules themselves
are `kv/policy.py`'s. `worker/tiers.py` asks, and tells of uses.
"""

from collections.abc import Iterable

from penstock.core.types import BlockHash
from penstock.kv.policy import Option, Temperature, choose_tier, temperature_of
from penstock.kv.residency import Residency
from penstock.kv.retention import Retention
from penstock.kv.reuse import ReuseHistory
from penstock.kv.tiers import Tier
from penstock.worker.costs import TierCosts


class Keeping:
    """Costs are asked for once after each `forget_costs`, so that what is decided in one go agrees.

    With `is_idle` writing costs nothing: nobody else wants link or processor.
    """

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
        self._prices: dict[Tier, tuple[float, float]] = {}
        self._options: dict[tuple[Tier, Tier, bool], Option] = {}

    def forget_costs(self) -> None:
        """Ask for what things cost anew."""
        self._prices.clear()
        self._options.clear()

    def temperature(self, name: BlockHash, into: Tier) -> Temperature:
        """Return how warm a block is, by what a copy in that tier would save and take to write."""
        price = self._prices.get(into)
        if price is None:
            costs = self._costs
            save_ns = costs.recompute_ns(1) - costs.move_ns(into, Tier.HBM)
            price = self._prices[into] = save_ns, costs.move_ns(Tier.HBM, into)
        save_ns, write_ns = price
        return temperature_of(self._expected_uses(name), save_ns=save_ns, write_ns=write_ns)

    def lower(
        self, name: BlockHash, above: Tier, below: Iterable[Tier], *, is_idle: bool
    ) -> Tier | None:
        """Return to which of the tiers below a block is to sink; None: to none, it is dropped."""
        return choose_tier(
            [self._option(above, tier, is_idle=is_idle) for tier in below],
            recompute_ns=self._costs.recompute_ns(1),
            expected_uses=self._expected_uses(name),
            num_bytes=self._costs.block_bytes,
        )

    def _option(self, above: Tier, tier: Tier, *, is_idle: bool) -> Option:
        option = self._options.get((above, tier, is_idle))
        if option is None:
            costs = self._costs
            option = self._options[above, tier, is_idle] = Option(
                tier,
                costs.move_ns(tier, Tier.HBM),
                0.0 if is_idle else costs.move_ns(above, tier),
                self._residency.capacity_bytes[tier],  # it will make room
            )
        return option

    def _expected_uses(self, name: BlockHash) -> float:
        """Return how often a block will be used again, once at most; what was asked for surely."""
        return 1.0 if self._retention.strength(name) else self.history.chance(name)
