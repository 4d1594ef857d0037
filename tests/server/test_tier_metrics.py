"""What is counted of tiers: every field there is, under a name that has words for people."""

import msgspec

from penstock.core.messages import Load
from penstock.core.tiers import PrefetchLoad, TierLoad
from penstock.core.types import WorkerId
from penstock.server.tier_metrics import PREFETCH_OUTCOMES, TIER_HELP, tier_totals

KEY = ("w", "mixed")


def totals() -> dict[str, dict[tuple[str, ...], float]]:
    tier = TierLoad("dram", 8, 4, num_hits=5, exposed_ns=2_500_000_000, exposed_decode_ns=10**9)
    load = Load(
        worker_id=WorkerId("w"),
        waiting=0,
        running=0,
        handing_off=0,
        free_blocks=(1,),
        cached_blocks=(1,),
        prefetches=PrefetchLoad(num_used=3, num_late=2),
    )
    found = tier_totals({(*KEY, "dram"): tier}, {KEY: load})
    return {name: values for name, _, values in found}


def test_every_total_has_its_value_and_its_words() -> None:
    found = totals()
    assert found["kv_tier_hits"] == {(*KEY, "dram"): 5}
    assert found["kv_tier_exposed_seconds"] == {(*KEY, "dram"): 2.5}
    assert found["kv_tier_exposed_decode_seconds"] == {(*KEY, "dram"): 1.0}
    assert found["kv_prefetches"][(*KEY, "used")] == 3
    assert found["kv_prefetches"][(*KEY, "late")] == 2
    assert set(found) <= set(TIER_HELP)


def test_every_outcome_of_a_wish_is_told() -> None:
    fields = [field.name for field in msgspec.structs.fields(PrefetchLoad)]
    assert fields == [f"num_{outcome}" for outcome in PREFETCH_OUTCOMES]
