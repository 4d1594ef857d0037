"""What is worth keeping: by the chance of another use, by what it saves, and by what it costs."""

from penstock.core.config import WorkerConfig
from penstock.core.tiers import TierConfig
from penstock.core.types import BlockHash, Role
from penstock.kv.policy import Temperature
from penstock.kv.residency import Residency
from penstock.kv.retention import Retention
from penstock.kv.reuse import ReuseHistory
from penstock.kv.tiers import Tier, TierSpec
from penstock.worker.costs import TierCosts
from penstock.worker.keeping import Keeping
from penstock.worker.traffic import Traffic
from tests.worker.story import LAYOUT, P0

SLOW = 20 * LAYOUT.block_bytes[0]
"""Bytes per second: a block takes 50 ms, each way."""


def keeping(*, disk_bytes_per_s: int = SLOW // 10) -> tuple[Keeping, Retention, TierCosts]:
    tiers = (
        TierConfig(name="dram", num_slots=100, bytes_per_s=SLOW),
        TierConfig(name="disk", num_slots=100, bytes_per_s=disk_bytes_per_s),
    )
    config = WorkerConfig(
        worker_id=P0,
        role=Role.MIXED,
        epoch=1,
        layout=LAYOUT,
        num_blocks=(100,),
        max_model_len=200,
        tiers=tiers,
    )
    costs = TierCosts(config, Traffic(config))
    retention = Retention(100)
    residency = Residency(TierSpec(tier=Tier(t.name), capacity_bytes=1 << 20) for t in tiers)
    return Keeping(ReuseHistory(300), retention, costs, residency), retention, costs


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16))


def compute_blocks_in(keep: Keeping, costs: TierCosts, ms: int) -> None:
    for _ in range(1000):
        costs.note_step(LAYOUT.block_size * 10, 10 * ms * 1_000_000)
    keep.forget_costs()


def test_what_nobody_ever_uses_again_gets_cold_and_what_is_to_be_kept_is_hot() -> None:
    keep, retention, costs = keeping()
    compute_blocks_in(keep, costs, 1000)
    found = []
    for number in range(2000):
        keep.history.use(name(number))
        found.append(keep.temperature(name(number), Tier.DRAM))
    assert found[0] is Temperature.HOT, "nothing is known yet"
    assert found[-1] is Temperature.COLD
    retention.retain([name(1999)], 10)
    assert keep.temperature(name(1999), Tier.DRAM) is Temperature.HOT


def test_what_is_sooner_computed_than_fetched_is_cold_and_the_more_it_saves_the_warmer() -> None:
    keep, _, costs = keeping()
    keep.history.use(name(1))
    for ms, expected in ((10, "cold"), (160, "warm"), (1000, "hot")):
        compute_blocks_in(keep, costs, ms)
        assert keep.temperature(name(1), Tier.DRAM).value == expected, ms


def test_costs_are_asked_for_once_until_they_are_forgotten() -> None:
    keep, _, costs = keeping()
    keep.history.use(name(1))
    compute_blocks_in(keep, costs, 1000)
    assert keep.temperature(name(1), Tier.DRAM) is Temperature.HOT
    for _ in range(1000):
        costs.note_step(LAYOUT.block_size * 10, 10)
    assert keep.temperature(name(1), Tier.DRAM) is Temperature.HOT
    keep.forget_costs()
    assert keep.temperature(name(1), Tier.DRAM) is Temperature.COLD


def test_a_block_sinks_to_where_it_is_worth_something_or_not_at_all() -> None:
    keep, _, costs = keeping()
    keep.history.use(name(1))
    compute_blocks_in(keep, costs, 400)
    assert keep.lower(name(1), Tier.DRAM, [Tier.DISK], is_idle=True) is None, "500 ms to fetch"
    compute_blocks_in(keep, costs, 600)
    assert keep.lower(name(1), Tier.DRAM, [Tier.DISK], is_idle=True) is Tier.DISK
    assert keep.lower(name(1), Tier.DRAM, [Tier.DISK], is_idle=False) is None, "500 ms to write"
    assert keep.lower(name(1), Tier.DRAM, [], is_idle=True) is None
    assert keep.lower(name(2), Tier.DRAM, [Tier.DISK], is_idle=True) is None, "never heard of"
