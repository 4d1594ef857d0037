"""What things take is learnt, and what is before them counts."""

import pytest

from penstock.core.config import WorkerConfig
from penstock.core.request import Timeline
from penstock.core.tiers import TierConfig
from penstock.core.types import NS_PER_S, Role
from penstock.kv.cache import KVCache
from penstock.kv.tiers import Tier
from penstock.worker.costs import BATCH_BLOCKS, TierCosts
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence
from penstock.worker.traffic import Traffic
from tests.worker.story import LAYOUT, P0, request

DRAM = TierConfig(name="dram", num_slots=100, bytes_per_s=1_000_000_000, latency_ns=1600)
CONFIG = WorkerConfig(
    worker_id=P0,
    role=Role.MIXED,
    epoch=1,
    layout=LAYOUT,
    num_blocks=(100,),
    max_model_len=200,
    tiers=(DRAM,),
)


def test_before_the_first_step_computing_takes_longer_than_any_fetch() -> None:
    costs = TierCosts(CONFIG, Traffic(CONFIG))
    assert costs.recompute_ns(3) == 3 * NS_PER_S
    costs.note_step(4, 1_000_000)  # decode steps say little
    costs.note_step(100, 0)
    assert costs.recompute_ns(3) == 3 * NS_PER_S
    costs.note_step(100, 100_000)
    assert costs.recompute_ns(2) == pytest.approx(2 * LAYOUT.block_size * 1000)


def test_short_steps_do_not_make_computing_seem_slow() -> None:
    costs = TierCosts(CONFIG, Traffic(CONFIG))
    costs.note_step(2048, 2048 * 100)
    for _ in range(10):  # what is left after a fetch: slow for its tokens
        costs.note_step(16, 16 * 1000)
    assert costs.recompute_ns(1) < 1.8 * LAYOUT.block_size * 100
    for _ in range(20):
        costs.note_step(2048, 2048 * 300)
    assert costs.recompute_ns(1) == pytest.approx(LAYOUT.block_size * 300, rel=0.05)


def test_blocks_of_a_batch_share_its_latency_and_a_lone_fetch_does_not() -> None:
    costs = TierCosts(CONFIG, Traffic(CONFIG))
    block_ns = LAYOUT.block_bytes[0]
    assert costs.fetch_ns(Tier.DRAM, 10) == pytest.approx(1600 + 10 * block_ns, abs=1)
    shared_ns = 1600 / BATCH_BLOCKS + block_ns
    assert costs.move_ns(Tier.HBM, Tier.DRAM) == pytest.approx(shared_ns, abs=1)


def test_a_request_has_its_turn_when_all_before_it_are_computed() -> None:
    costs = TierCosts(CONFIG, Traffic(CONFIG))
    scheduler = Scheduler(CONFIG, KVCache(LAYOUT, (100,)))
    assert costs.turn_ns(scheduler) == 0
    for count in (30, 70):
        ahead = Sequence(request(f"r{count}", count), CONFIG, arrival=count, timeline=Timeline())
        scheduler.add(ahead)
    costs.note_step(100, 100_000)
    assert costs.turn_ns(scheduler) == pytest.approx(100 * 1000)
