"""What may be asked of a cluster."""

import pytest

from penstock.core.config import ControllerConfig, EngineConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.kv.quality import KvQuality
from penstock.runtime.settings import (
    ClusterSettings,
    NetworkSettings,
    PulseSettings,
    TierSettings,
    split_address,
)

LOSSY = KvQuality(loss_max=0.01)
HERE = NetworkSettings(host="127.0.0.1")


@pytest.mark.parametrize("text", ["", "host", "host:", ":7777", "host:port", "host:70000"])
def test_what_is_no_address_is_refused_by_the_flag(text: str):
    with pytest.raises(StartupFailed, match=r"--join .*HOST:PORT"):
        split_address(text, "--join")


def test_addresses():
    assert split_address("host:7777", "--join") == ("host", 7777)
    assert split_address("[::1]:7777", "--join") == ("::1", 7777)
    assert split_address("tcp://10.0.0.5:1", "--join") == ("10.0.0.5", 1)


def test_without_other_hosts_there_must_be_workers_here():
    engine = EngineConfig(model="m")
    with pytest.raises(StartupFailed, match="--listen"):
        ClusterSettings(engine=engine, prefill=0, decode=0)
    settings = ClusterSettings(
        engine=engine, prefill=0, decode=0, network=NetworkSettings(host="127.0.0.1")
    )
    assert settings.num_workers == 0


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_what_only_reads_cannot_push(transport: str):
    with pytest.raises(StartupFailed, match=f"--handoff push: over {transport}"):
        ClusterSettings(engine=EngineConfig(model="m"), transport=transport, handoff=Handoff.PUSH)
    ClusterSettings(engine=EngineConfig(model="m"), transport="shm", handoff=Handoff.PUSH)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "--kv-quality is exact"),
        ({"kv_quality": LOSSY, "transport": "shm"}, "only what is pulled over TCP"),
        ({"kv_quality": LOSSY, "transport": "auto"}, "--listen or --transport tcp"),
        (
            {"kv_quality": LOSSY, "transport": "auto", "network": HERE, "handoff": Handoff.PUSH},
            "push",
        ),
        (
            {"kv_quality": LOSSY, "tiers": (TierSettings(name="dram", num_bytes=1, codec="int4"),)},
            "one lossy codec for all tiers and hand-offs, not int4, int8",
        ),
    ],
)
def test_blocks_that_cannot_cross_encoded_are_not_asked_to(options: dict, match: str):
    defaults = {"engine": EngineConfig(model="m"), "transport": "tcp", "handoff_codec": "int8"}
    with pytest.raises(StartupFailed, match=match):
        ClusterSettings(**{**defaults, **options})
    ClusterSettings(**defaults, kv_quality=LOSSY)
    ClusterSettings(**{**defaults, "transport": "auto"}, kv_quality=LOSSY, network=HERE)


def test_a_pull_needs_a_connection():
    with pytest.raises(StartupFailed, match="--tcp-streams: 0"):
        ClusterSettings(engine=EngineConfig(model="m"), transport="tcp", tcp_streams=0)


def test_workers_of_another_host_are_called_after_it():
    settings = ClusterSettings(
        engine=EngineConfig(model="m"),
        decode=2,
        prefill=0,
        host="gpu3",
        network=NetworkSettings(host="127.0.0.1"),
    )
    assert list(settings.workers()) == ["decode-gpu3-0", "decode-gpu3-1"]


def test_silence_must_be_longer_than_a_few_heartbeats():
    with pytest.raises(StartupFailed, match="--lost-after"):
        PulseSettings(interval_s=1.0, suspect_after_s=0.5, lost_after_s=1.5)


@pytest.mark.parametrize(
    ("least", "most", "counts", "said"),
    [
        (3, 2, {}, "--min-workers 3 is more than --max-workers 2"),
        (1, 2, {"decode": 2}, "--max-workers 2: --prefill 1 --decode 2 --mixed 0 are 3"),
        (3, 4, {}, "--min-workers 3: --prefill 1 --decode 1 --mixed 0 are only 2"),
        (1, 2, {"prefill": 0, "decode": 0}, "load no model here"),
    ],
)
def test_limits_of_the_number_of_workers_must_hold_what_it_begins_with(
    least: int, most: int, counts: dict[str, int], said: str
):
    control = ControllerConfig(workers_min=least, workers_max=most)
    network = NetworkSettings(host="127.0.0.1")
    with pytest.raises(StartupFailed, match=said):
        ClusterSettings(engine=EngineConfig(model="m"), control=control, network=network, **counts)


def test_cores_and_memory_do_for_the_most_workers_there_may_be():
    control = ControllerConfig(workers_min=2, workers_max=6)
    settings = ClusterSettings(engine=EngineConfig(model="m"), control=control)
    assert (settings.num_workers, settings.most_workers) == (2, 6)
    assert ClusterSettings(engine=EngineConfig(model="m"), decode=4).most_workers == 5
