"""Codecs of tiers, decided on the built-in model: measured, refused with figures, chosen."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import MIB
from penstock.engine.loading import load_model
from penstock.kv.quality import KvQuality, parse_quality
from penstock.runtime import tier_codecs as module
from penstock.runtime.codecs import PROBE
from penstock.runtime.settings import TierSettings
from penstock.runtime.tier_codecs import Chosen, tier_codecs

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 32
GB = 1_000_000_000


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(model=str(FOLDER), dtype="bfloat16"), lambda *_: None)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A disk so slow that the smallest codec wins, and memory that no codec keeps up with."""
    found = {"dram": 1000 * GB, "disk": GB // 100}
    monkeypatch.setattr(module, "tier_bytes_per_s", lambda tier: found[tier.name])


def probe() -> Sequence[int]:
    text = PROBE.read_text(encoding="utf-8")
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids


def choose(model, quality: str, **codecs: str) -> Chosen:
    tiers = [TierSettings(name=n, num_bytes=MIB, path="/x", codec=c) for n, c in codecs.items()]
    return tier_codecs(model, tiers, parse_quality(quality), probe, block_size=BLOCK_SIZE)


def test_what_is_not_asked_for_is_not_measured(model):
    def no_probe() -> Sequence[int]:
        raise AssertionError("nothing was to be read")

    tiers = [TierSettings(name="dram", num_bytes=MIB)]
    assert tier_codecs(model, tiers, KvQuality(), no_probe, block_size=BLOCK_SIZE) == Chosen()


def test_a_budget_admits_refuses_and_the_link_chooses(model):
    # int8 and fp8 cost this model nothing that a short text shows; int4 may cost 0.13 %.
    chosen = choose(model, "0.1%", dram="", disk="")
    assert [codec.name for codec in chosen.codecs] == ["raw", "fp8"]
    disk = chosen.codecs[1]
    (block_bytes,) = model.layout(BLOCK_SIZE).block_bytes
    assert disk.is_lossy
    assert 0.53 < disk.slot_bytes / block_bytes < 0.54
    assert disk.decode_ns > 0
    told = {note.split(":")[0]: note for note in chosen.notes}
    assert set(told) == {"lossless", "int8", "fp8", "refused"}
    assert "--kv-quality allows 0.100%" in told["refused"]
    assert "of greedy tokens the same" in told["int8"]


def test_exact_and_auto_is_lossless_where_that_is_quicker(model):
    chosen = choose(model, "exact", dram="auto", disk="auto")
    assert [codec.name for codec in chosen.codecs] == ["raw", "lossless"]
    assert not chosen.codecs[1].is_lossy
    (block_bytes,) = model.layout(BLOCK_SIZE).block_bytes
    assert 0.6 < chosen.codecs[1].slot_bytes / block_bytes < 0.75


def test_a_codec_above_the_budget_is_refused_with_what_was_measured(model):
    with pytest.raises(StartupFailed, match=r"codec=sparse is refused: sparse raises .* by \d"):
        choose(model, "0.1%", dram="sparse")
    with pytest.raises(StartupFailed, match="greedy tokens stay the same"):
        choose(model, "50%,99.9%", dram="int4")


def test_the_way_between_hosts_is_judged_as_a_tier_is_and_has_the_same_codec(model):
    def on_wire(quality: str, wire: str, *tiers: TierSettings) -> Chosen:
        quality = parse_quality(quality)
        return tier_codecs(model, tiers, quality, probe, block_size=BLOCK_SIZE, wire=wire)

    alone = on_wire("0.1%", "int8")
    assert (alone.codecs, alone.wire.name, alone.wire.is_lossy) == ((), "int8", True)
    assert alone.wire.decode_ns > 0 < alone.wire.encode_ns
    assert len(alone.notes) == 1
    with pytest.raises(StartupFailed, match=r"--handoff-codec: codec=int4 is refused"):
        on_wire("0.01%", "int4")
    with pytest.raises(StartupFailed, match=r"--kv-tier, --handoff-codec: codec=int4 is refused"):
        on_wire("0.01%", "int4", TierSettings(name="dram", num_bytes=MIB, codec="raw"))
    # fp8 would be the quickest on this disk; a second lossy codec would lose more than measured.
    disk = TierSettings(name="disk", num_bytes=MIB, path="/x")
    both = on_wire("0.1%", "int8", disk)
    assert [codec.name for codec in both.codecs] == ["int8"]
    assert both.wire.name == "int8"


def test_blocks_too_large_for_the_probe_are_said(model):
    tiers = [TierSettings(name="dram", num_bytes=MIB, codec="lossless")]
    with pytest.raises(StartupFailed, match="--block-size"):
        tier_codecs(model, tiers, KvQuality(), lambda: probe()[:60], block_size=BLOCK_SIZE)
