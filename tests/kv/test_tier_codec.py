"""Which codec a tier gets: the quickest within the budget, one lossy one in all."""

from penstock.kv.tier_codec import TierWay, choose_tier_codecs, read_ns
from penstock.kv.tiers import CodecSpec

GB = 1_000_000_000
RAW = CodecSpec(name="raw", block_bytes=100_000)
LOSSLESS = CodecSpec(name="lossless", block_bytes=67_000, decode_ns=40_000)
INT8 = CodecSpec(name="int8", block_bytes=56_000, decode_ns=7_000, loss=0.0004)
INT4 = CodecSpec(name="int4", block_bytes=31_000, decode_ns=6_000, loss=0.002)
MEMORY = TierWay(10 * GB, is_memory=True)
SLOW_MEMORY = TierWay(20 * GB, is_memory=True)
DISK = TierWay(GB // 2, is_memory=False)
FAST_DISK = TierWay(20 * GB, is_memory=False)


def chosen(ways: list[TierWay], codecs: list[CodecSpec], *asked: CodecSpec | None) -> list[str]:
    wanted = asked or (None,) * len(ways)
    return [codec.name for codec in choose_tier_codecs(ways, wanted, codecs)]


def test_bytes_cost_what_the_link_says_and_decoding_comes_on_top():
    assert read_ns(RAW, MEMORY) == 10_000
    assert read_ns(INT8, DISK) == 112_000 + 7_000
    # A lossy codec decodes out of the slots; a lossless one passes by a buffer.
    assert read_ns(INT8, MEMORY) == 7_000
    assert read_ns(LOSSLESS, MEMORY) == 6_700 + 40_000


def test_the_slower_the_link_the_smaller_the_block():
    exact, all_codecs = [RAW, LOSSLESS], [RAW, LOSSLESS, INT8, INT4]
    assert chosen([DISK], exact) == ["lossless"]
    assert chosen([FAST_DISK], exact) == ["raw"]
    assert chosen([DISK], all_codecs) == ["int4"]
    assert chosen([DISK], [RAW, LOSSLESS, INT8]) == ["int8"]
    assert chosen([FAST_DISK], all_codecs) == ["raw"]
    assert chosen([MEMORY], [RAW, LOSSLESS]) == ["raw"]


def test_a_block_that_sinks_is_not_lost_upon_twice():
    assert chosen([SLOW_MEMORY, DISK], [RAW, LOSSLESS, INT8, INT4]) == ["raw", "int4"]
    assert chosen([MEMORY, DISK], [RAW, INT8, INT4], INT8, None) == ["int8", "int8"]
    assert chosen([MEMORY, DISK], [RAW, LOSSLESS, INT8, INT4], RAW, LOSSLESS) == [
        "raw",
        "lossless",
    ]
