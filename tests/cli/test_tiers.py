"""From `--kv-tier` to slots of a worker."""

from pathlib import Path

import pytest

from penstock.cli.tiers import check_tiers, describe_tiers, open_tiers, tier_configs, tier_regions
from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import MIB, Role, WorkerId
from penstock.kv.quality import KvQuality
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import ClusterSettings, TierCodec, TierSettings
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
    assert [s.store.num_slots * block_bytes for s in stores.values()] == [MIB, 2 * MIB]
    assert (tmp_path / "prefill-0.kv").stat().st_size >= 2 * MIB
    others = open_tiers(wanted, spec(Role.DECODE), LAYOUT)
    assert [s.store.num_slots for s in others.values()] == [
        s.store.num_slots for s in stores.values()
    ]
    for store in (*stores.values(), *others.values()):
        store.store.close()


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


def test_codecs_that_nobody_measured_are_not_taken_for_raw():
    coded = TierSettings(name="dram", num_bytes=MIB, codec="lossless")
    check_tiers(settings(coded), LAYOUT)
    with pytest.raises(StartupFailed, match="and here is none"):
        check_tiers(settings(coded), LAYOUT, [])
    check_tiers(settings(coded), LAYOUT, [TierCodec(name="lossless", slot_bytes=9000)])


def test_people_are_told_what_there_is_and_what_is_emulated():
    tiers = (
        TierSettings(name="cxl", num_bytes=2 * MIB),
        TierSettings(name="disk", num_bytes=4 * MIB, path="/x"),
    )
    told = describe_tiers(settings(*tiers, prefill=2))
    assert told == f"2 MiB {cxl_kind()}, 4 MiB disk /x; shared by 3 workers"
    assert describe_tiers(settings()) == ""


def test_slots_of_a_codec_are_smaller_and_so_more(tmp_path: Path):
    (block_bytes,) = LAYOUT.block_bytes
    int8 = make_codec("int8", LAYOUT)
    codec = TierCodec(name="int8", is_lossy=True, slot_bytes=int8.encoded_bytes, decode_ns=50)
    disk = TierSettings(name="disk", num_bytes=2 * MIB, path=str(tmp_path), codec="int8")
    wanted = settings(disk, kv_quality=KvQuality(0.01))
    check_tiers(wanted, LAYOUT, [codec])
    told = describe_tiers(wanted, LAYOUT, [codec])
    assert told.startswith(f"2 MiB disk {tmp_path} as int8 (slots of 0.30 blocks)")
    tiers = open_tiers(wanted, spec(Role.PREFILL), LAYOUT, [codec])
    (config,) = tier_configs(tiers, "lru")
    assert config.num_slots == MIB // int8.encoded_bytes > MIB // block_bytes
    assert (config.codec, config.is_lossy, config.slot_bytes, config.decode_ns) == (
        "int8",
        True,
        int8.encoded_bytes,
        50,
    )
    (region,) = tier_regions(tiers)
    assert (region.codec, region.label) == ("int8", "disk")
    tiers["disk"].store.close()
    # A file of another codec is another file: what it holds would be decoded to something else.
    raw = open_tiers(settings(disk, kv_quality=KvQuality(0.01)), spec(Role.PREFILL), LAYOUT)
    assert tier_configs(raw, "lru")[0].kept == ()
    raw["disk"].store.close()
