"""From `--kv-tier` to slots of a worker."""

from pathlib import Path

import pytest

from penstock.cli.tiers import check_tiers, describe_tiers, open_tiers, tier_configs
from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import MIB, Role, WorkerId
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import ClusterSettings, TierSettings
from penstock.transport.cxl import cxl_kind

LAYOUT = KVLayout("m", (KVGroup((0, 1)),), 2, 32, 16, "float32")


def settings(*tiers: TierSettings, **options) -> ClusterSettings:
    return ClusterSettings(engine=EngineConfig(model="m"), tiers=tiers, **options)


def spec(role: Role) -> WorkerSpec:
    return WorkerSpec(worker_id=WorkerId(f"{role.value}-0"), role=role, epoch=1, index=0)


def test_all_workers_of_a_host_share_the_tiers(tmp_path: Path):
    tiers = (
        TierSettings(name="dram", num_bytes=2 * MIB),
        TierSettings(name="disk", num_bytes=4 * MIB, path=str(tmp_path)),
    )
    wanted = settings(*tiers, prefill=1)
    stores = open_tiers(wanted, spec(Role.PREFILL), LAYOUT)
    (block_bytes,) = LAYOUT.block_bytes
    configs = tier_configs(stores, "arc")
    assert [config.name for config in configs] == ["dram", "disk"]
    assert {config.eviction for config in configs} == {"arc"}
    assert [s.num_slots * block_bytes for s in stores.values()] == [MIB, 2 * MIB]
    assert (tmp_path / "prefill-0.kv").stat().st_size >= 2 * MIB
    others = open_tiers(wanted, spec(Role.DECODE), LAYOUT)
    assert [s.num_slots for s in others.values()] == [s.num_slots for s in stores.values()]
    for store in (*stores.values(), *others.values()):
        store.close()


def test_what_cannot_be_is_refused_before_anything_starts():
    dram = TierSettings(name="dram", num_bytes=MIB)
    check_tiers(settings(dram), LAYOUT)
    windowed = KVLayout("m", (KVGroup((0,)), KVGroup((1,), 64)), 2, 32, 16, "float32")
    check_tiers(settings(), windowed)
    with pytest.raises(StartupFailed, match="sliding windows"):
        check_tiers(settings(dram), windowed)
    with pytest.raises(StartupFailed, match="no-prefix-caching"):
        check_tiers(settings(dram, is_prefix_caching=False), LAYOUT)
    with pytest.raises(StartupFailed, match="hold no block"):
        check_tiers(settings(TierSettings(name="dram", num_bytes=1)), LAYOUT)


def test_people_are_told_what_there_is_and_what_is_emulated():
    tiers = (
        TierSettings(name="cxl", num_bytes=2 * MIB),
        TierSettings(name="disk", num_bytes=4 * MIB, path="/x"),
    )
    told = describe_tiers(settings(*tiers, prefill=2))
    assert told == f"2 MiB {cxl_kind()}, 4 MiB disk /x; shared by 3 workers"
    assert describe_tiers(settings()) == ""
