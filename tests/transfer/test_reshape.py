"""Plans between shapes against writing the same tokens one by one."""

import numpy as np
import pytest
from msgspec.structs import replace

from penstock.core.errors import BadRequest
from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.transfer.reshape import convert, cut_staged, plan_reshape, whole_blocks
from tests.transfer.shapes import (
    GROUPS,
    NUM_BLOCKS,
    WHOLE,
    content_of,
    empty_pool,
    shard,
    table,
    with_digests,
    write,
)

SIZES = (16, 32, 64, 128)
TOKENS = ((0, 128), (0, 77), (21, 130), (48, 49), (16, 160))
DEGREES = [(theirs, ours) for theirs in (1, 2, 4) for ours in (1, 2, 4)]


def carry_out(plan, source, ours, num_staged):
    """Do what a transport does, without one."""
    if plan.is_direct:
        ours[plan.direct_ids] = source[plan.source_ids]
        return
    staged = np.empty((num_staged, source.shape[1]), np.uint8)
    for part, spans, pieces in plan.rounds(num_staged):
        for start, to, count in spans.tolist():
            staged[to : to + count] = source[start : start + count]
        assert part.stop - part.start == spans[:, 2].sum() <= num_staged
        cut_staged(plan, staged, ours, pieces)


def check(theirs_size, ours_size, dtypes, degrees, tokens, group=0, num_staged=3):
    begin, end = tokens
    rng = np.random.default_rng((theirs_size, ours_size, *degrees, *tokens))
    content = content_of(end + 130, group)
    for our_rank in range(degrees[1]):
        ours = shard(degrees[1], our_rank, ours_size, dtypes[1])
        destination, expected = empty_pool(ours, group), empty_pool(ours, group)
        our_blocks = table(rng, ours, begin, end)
        for rank in range(degrees[0]):
            theirs = shard(degrees[0], rank, theirs_size, dtypes[0])
            if not set(theirs.kv_heads) & set(ours.kv_heads):
                continue
            source, blocks = empty_pool(theirs, group), table(rng, theirs, begin, end)
            held = range(
                blocks.first * theirs_size, (blocks.first + len(blocks.block_ids)) * theirs_size
            )
            write(source, theirs, blocks, content, (t for t in held if t < len(content)))
            plan = plan_reshape(theirs, ours, group, Reshape(blocks, our_blocks, begin, end))
            carry_out(plan, source, destination, num_staged)
        write(expected, ours, our_blocks, content, range(begin, end))
        if plan.is_direct:  # fills its last block with what the peer has there
            last = range(end, -(-end // ours_size) * ours_size)
            write(expected, ours, our_blocks, content, last)
        assert (destination == expected).all(), (ours, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", [(a, b) for a in SIZES for b in SIZES])
def test_block_sizes(sizes, tokens):
    check(*sizes, ("float32", "float32"), (1, 1), tokens)
    check(*sizes, ("bfloat16", "float32"), (1, 1), tokens, group=1, num_staged=1)


@pytest.mark.parametrize("theirs", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ours", ["float32", "bfloat16", "float16"])
def test_dtypes(theirs, ours):
    check(16, 32, (theirs, ours), (1, 1), (21, 130))
    check(32, 32, (theirs, ours), (2, 1), (0, 77), group=1)


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 16)])
def test_tensor_parallel_degrees(degrees, sizes):
    check(*sizes, ("float32", "float32"), degrees, (21, 130))
    check(*sizes, ("float32", "bfloat16"), degrees, (0, 77), group=1)


def test_sizes_that_are_no_multiples_work_too():
    check(16, 24, ("float32", "float32"), (1, 1), (5, 101))
    check(24, 16, ("float32", "float32"), (1, 1), (5, 101))


def blocks_of(*block_ids, first=0):
    return GroupBlocks(first, block_ids)


def test_a_plan_reads_whole_blocks_in_few_spans_and_cuts_where_either_side_ends():
    ours = replace(WHOLE, block_size=32)
    wanted = Reshape(blocks_of(4, 5, 6, 9), blocks_of(1, 0), 8, 60)

    plan = plan_reshape(WHOLE, ours, 0, wanted)

    assert plan.source_ids.tolist() == [4, 5, 6, 9]
    assert plan.pieces.tolist() == [
        [0, 8, 1, 8, 8], [1, 0, 1, 16, 16], [2, 0, 0, 0, 16], [3, 0, 0, 16, 12]
    ]  # fmt: skip
    ((part, spans, pieces),) = plan.rounds(8)
    assert (part, spans.tolist()) == (slice(0, 4), [[4, 0, 3], [9, 3, 1]])
    assert pieces.tolist() == plan.pieces.tolist()
    rounds = [
        (part.start, spans.tolist(), pieces[:, 0].tolist())
        for part, spans, pieces in plan.rounds(3)
    ]
    assert rounds == [(0, [[4, 0, 3]], [0, 1, 2]), (3, [[9, 0, 1]], [0])]


def test_blocks_of_the_same_shape_are_copied_as_they_are():
    wanted = Reshape(blocks_of(4, 5, 6, first=1), blocks_of(7, 8, first=2), 32, 60)
    plan = plan_reshape(WHOLE, WHOLE, 0, wanted)
    assert plan.is_direct
    assert (plan.source_ids.tolist(), plan.direct_ids.tolist()) == ([5, 6], [7, 8])

    beside = plan_reshape(WHOLE, WHOLE, 0, Reshape(wanted.source, wanted.destination, 40, 60))
    assert not beside.is_direct, "tokens 32 to 39 of our block are not to be written"


def test_no_tokens_are_no_blocks():
    plan = plan_reshape(
        WHOLE, replace(WHOLE, block_size=32), 0, Reshape(blocks_of(), blocks_of(), 7, 7)
    )
    assert not len(plan.source_ids)
    assert not list(plan.rounds(1))


def test_whole_blocks_are_those_that_are_written_to_the_end():
    ours = blocks_of(7, 8, 9, first=1)
    for begin, end, whole in ((32, 128, (7, 8, 9)), (33, 127, (8,)), (33, 63, ()), (40, 90, ())):
        wanted = Reshape(blocks_of(), blocks_of(*ours.block_ids, first=1), begin, end)
        assert whole_blocks(wanted, 32) == whole, (begin, end)


@pytest.mark.parametrize(
    "wanted",
    [
        Reshape(blocks_of(1, 2), blocks_of(1), 0, 33),
        Reshape(blocks_of(1, 2, first=1), blocks_of(1), 0, 32),
        Reshape(blocks_of(1, 2, 3), blocks_of(1), 0, 33),
        Reshape(blocks_of(1, 2), blocks_of(1, first=1), 16, 32),
        Reshape(blocks_of(1, 2), blocks_of(1), 8, 7),
        Reshape(blocks_of(1, 2), blocks_of(1), -16, 16),
        Reshape(GroupBlocks(0, (1, 2), (5,)), blocks_of(1), 0, 32),
    ],
)
def test_blocks_that_do_not_hold_the_tokens_are_refused(wanted):
    with pytest.raises(BadRequest):
        plan_reshape(WHOLE, replace(WHOLE, block_size=32), 0, wanted)


def test_layouts_that_do_not_go_together_are_refused_with_both_fingerprints():
    wanted = Reshape(blocks_of(1), blocks_of(1), 0, 16)
    other = replace(WHOLE, model="m at another revision")
    with pytest.raises(BadRequest, match=f"{WHOLE.fingerprint()}.*{other.fingerprint()}.*model"):
        plan_reshape(other, WHOLE, 0, wanted)
    with pytest.raises(BadRequest, match="none in common"):
        plan_reshape(shard(2, 0, 16, "float32"), shard(4, 3, 16, "float32"), 0, wanted)


def test_digests_belong_to_the_blocks_that_are_read():
    pool = empty_pool(WHOLE)
    pool[:] = np.arange(NUM_BLOCKS)[:, None]
    offered = with_digests(pool, blocks_of(3, 8, 5, 1))
    ours = replace(WHOLE, dtype="bfloat16")
    plan = plan_reshape(WHOLE, ours, 0, Reshape(offered, blocks_of(0, 1, 2, 3), 16, 48))
    assert plan.source_ids.tolist() == [8, 5]
    assert plan.digests == offered.digests[1:3]


def all_bits(dtype):
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(dtype)


def nearest_bfloat16(exact):
    """Return the bits of the nearest bfloat16, in the middle the even one; compares distances."""
    bits = exact.view(np.uint32)
    below = bits & 0xFFFF0000
    above = below + 0x10000
    exact, low, high = (
        v.astype(np.float64) for v in (exact, below.view(np.float32), above.view(np.float32))
    )
    high = np.where(np.isinf(high), np.sign(high) * 2.0**128, high)
    down, up = np.abs(exact - low), np.abs(high - exact)
    is_up = (up < down) | ((up == down) & ((above >> 16) % 2 == 0))
    return (np.where(is_up, above, below) >> 16).astype(np.uint16)


def test_float32_is_rounded_to_the_nearest_even_bfloat16():
    rng = np.random.default_rng(0)
    high = rng.integers(0, 1 << 16, 20000, dtype=np.uint32) << 16
    low = rng.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), 20000)
    values = (high | low).view(np.float32)
    values = values[np.isfinite(values)]
    assert (convert(values, "float32", "bfloat16") == nearest_bfloat16(values)).all()


def test_every_16_bit_number_survives_float32_and_comes_back():
    for dtype, kind in (("bfloat16", np.uint16), ("float16", np.float16)):
        values = all_bits(kind)
        wide = convert(values, dtype, "float32")
        back = convert(wide, "float32", dtype)
        is_number = ~np.isnan(wide)
        assert (back.view(np.uint16) == values.view(np.uint16))[is_number].all()
        assert np.isnan(convert(back, dtype, "float32"))[~is_number].all()


def test_float16_becomes_the_nearest_bfloat16():
    values = all_bits(np.float16)
    values = values[np.isfinite(values)]
    exact = values.astype(np.float32)
    assert (convert(values, "float16", "bfloat16") == nearest_bfloat16(exact)).all()


def test_what_is_too_large_for_float16_is_infinite():
    large = np.array([65519, 65520, -1e9], np.float32)
    assert convert(large, "float32", "float16").tolist() == [65504, np.inf, -np.inf]


def test_both_groups_have_their_own_number_of_layers():
    ours = replace(WHOLE, block_size=32)
    wanted = Reshape(blocks_of(1), blocks_of(1), 0, 16)
    plans = [plan_reshape(WHOLE, ours, group, wanted) for group in range(len(GROUPS))]
    assert [plan.num_layers for plan in plans] == [2, 1]
