"""Values of the command line: tiers with their codecs, and budgets."""

from argparse import ArgumentTypeError

import pytest

from penstock.cli.values import kv_quality, kv_tier
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB
from penstock.kv.quality import KvQuality
from penstock.runtime.settings import ClusterSettings, TierSettings


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ("dram=8GiB", TierSettings(name="dram", num_bytes=8 * GIB)),
        ("cxl=1GiB,codec=auto", TierSettings(name="cxl", num_bytes=GIB, codec="auto")),
        (
            "disk=/a,b,2GiB,codec=int8",
            TierSettings(name="disk", num_bytes=2 * GIB, path="/a,b", codec="int8"),
        ),
    ],
)
def test_a_tier_is_read(text: str, tier: TierSettings):
    assert kv_tier(text) == tier


@pytest.mark.parametrize("text", ["dram", "tape=1GiB", "disk=1GiB", "dram=1GiB,codec=zip"])
def test_what_is_no_tier_is_refused(text: str):
    with pytest.raises(ArgumentTypeError):
        kv_tier(text)


def test_a_budget_is_read_and_refused():
    assert kv_quality("0.1%") == KvQuality(0.001)
    with pytest.raises(ArgumentTypeError, match="share"):
        kv_quality("a little")


def settings(quality: str, *codecs: str) -> ClusterSettings:
    names = ("dram", "cxl", "disk")
    tiers = (
        TierSettings(name=n, num_bytes=GIB, codec=c) for n, c in zip(names, codecs, strict=False)
    )
    return ClusterSettings(
        engine=EngineConfig(model="m"), tiers=tuple(tiers), kv_quality=kv_quality(quality)
    )


def test_a_lossy_codec_wants_a_budget_and_is_the_only_one():
    settings("1%", "int8", "lossless", "int8")
    settings("exact", "lossless", "auto", "raw")
    with pytest.raises(StartupFailed, match="int8 is lossy, and --kv-quality is exact"):
        settings("exact", "int8")
    with pytest.raises(
        StartupFailed, match="one lossy codec for all tiers and hand-offs, not int4, int8"
    ):
        settings("1%", "int8", "int4")
