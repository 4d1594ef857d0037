"""A codec as the orchestrator sees it: names, bytes and times of one block."""

import numpy as np
import pytest

from penstock.codec.codec import CODECS, make_codec
from penstock.codec.price import price
from penstock.core.block import KVGroup, KVLayout
from penstock.kv.policy import choose_codec
from penstock.kv.quality import charged_loss
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier

LAYOUT = KVLayout("m", (KVGroup((0, 1)),), 4, 32, 32, "bfloat16")


def sample(num_blocks=3):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(num_blocks * LAYOUT.block_bytes[0] // 2).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return bits.view(np.uint8).reshape(num_blocks, -1)


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_the_codecs_own_and_times_are_measured(name):
    codec, blocks = make_codec(name, LAYOUT), sample()
    before = blocks.copy()
    spec = price(codec, blocks, loss=0.0 if codec.is_lossless else 0.001)
    assert (blocks == before).all()
    assert spec.name == name
    assert spec.encode_ns > 0
    assert spec.decode_ns > 0
    if codec.is_lossless:
        assert spec.loss == 0
        assert 0.6 < spec.block_bytes / codec.block_bytes < 0.75
    else:
        assert spec.block_bytes == codec.encoded_bytes


def test_a_lossy_codec_without_a_loss_is_a_bug():
    with pytest.raises(AssertionError):
        price(make_codec("int8", LAYOUT), sample(), loss=0.0)


def test_the_policy_chooses_among_them_by_link_and_budget():
    raw = CodecSpec(name=RAW, block_bytes=LAYOUT.block_bytes[0])
    codecs = [raw] + [
        price(codec, sample(), loss=charged_loss(None) if codec.is_lossless else 0.001)
        for codec in (make_codec(name, LAYOUT) for name in ("lossless", "int8", "int4"))
    ]

    def chosen(bytes_per_ns, loss_max):
        link = LinkSpec(
            source=Tier.DISK, destination=Tier.DRAM, latency_ns=0, bytes_per_ns=bytes_per_ns
        )
        return choose_codec(codecs, link, loss_max=loss_max).name

    # A slow disk: the fewest bytes that the budget allows. A link faster than any decoder: raw.
    assert chosen(1e-3, 0.01) == "int4"
    assert chosen(1e-3, 0.0) == "lossless"
    assert chosen(1e9, 0.01) == RAW
