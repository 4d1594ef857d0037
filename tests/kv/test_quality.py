"""The quality budget: how it is written, and which codecs it admits."""

from math import nan

import pytest

from penstock.kv.quality import (
    LOSS_MIN,
    KvQuality,
    Measured,
    charged_loss,
    parse_quality,
    refusal,
)


@pytest.mark.parametrize(
    ("text", "quality"),
    [
        ("exact", KvQuality()),
        ("0", KvQuality()),
        ("0.5%", KvQuality(0.005)),
        ("0.005", KvQuality(0.005)),
        ("1%,98%", KvQuality(0.01, 0.98)),
    ],
)
def test_a_budget_is_read(text, quality):
    assert parse_quality(text) == quality


@pytest.mark.parametrize("text", ["", "some", "1%,", "-1%", "nan", "101%", "1%,200%", "1%,x"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="share"):
        parse_quality(text)


def test_the_default_admits_lossless_codecs_alone():
    assert refusal(KvQuality(), "lossless", None) is None
    # Chance lowered the loss: lossy all the same.
    for increase in (0.0, -0.01, 0.0004):
        message = refusal(KvQuality(), "int8", Measured(increase, 1.0))
        assert message == "int8 is lossy, and --kv-quality is exact"
    assert charged_loss(None) == 0


def test_a_codec_that_exceeds_the_budget_is_refused_with_the_figures():
    quality = KvQuality(0.001, 0.98)
    assert refusal(quality, "int8", Measured(0.0004, 0.995)) is None
    assert refusal(quality, "int4", Measured(0.02, 0.97)) == (
        "int4 raises this model's loss by 2.000% (at most 2.000%), and --kv-quality allows 0.100%"
    )
    assert refusal(quality, "fp8", Measured(0.0, 0.9)) == (
        "with fp8 only 90.00% of this model's greedy tokens stay the same, and --kv-quality asks "
        "for 98.00%"
    )
    assert "nan" in refusal(quality, "int4", Measured(nan, 1.0))
    assert refusal(quality, "int4", Measured(0.0, nan))


def test_a_lossy_codec_is_never_free():
    assert charged_loss(Measured(-0.5, 1.0)) == LOSS_MIN
    assert charged_loss(Measured(0.003, 1.0)) == 0.003


def test_the_luck_of_a_short_text_admits_nothing():
    lucky = Measured(-0.0002, 1.0, loss_error=0.001)
    assert charged_loss(lucky) == pytest.approx(0.0018)
    assert "at most 0.180%" in refusal(KvQuality(0.001), "int4", lucky)
    assert refusal(KvQuality(0.002), "int4", lucky) is None
