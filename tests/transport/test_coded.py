"""Tiers of encoded slots: what comes back, what it is known by, and what broken slots come to."""

from pathlib import Path

import numpy as np
import pytest

from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import Move, MoveClass, Span, TierEnds
from penstock.core.types import NO_DIGEST, BlockHash, BlockId, Digest, RequestId, WorkerId
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import align, cut
from penstock.transfer.region import Region
from penstock.transport.coded import CodedTier, flatten
from penstock.transport.cxl import EmulatedTier
from penstock.transport.disk import DiskTier
from penstock.transport.tier import MemoryTier
from penstock.transport.tier_mover import TierMover

LAYOUT = KVLayout("m", (KVGroup((0, 1)),), 2, 32, 16, "bfloat16")
(BLOCK_BYTES,) = LAYOUT.block_bytes
PAGE = 4096
NUM_SLOTS = 8
KINDS = ("memory", "emulated", "disk")


def make_pool(num_blocks: int = 12) -> Region:
    """Numbers like those of KV: lossless finds something to take away."""
    numbers = np.random.default_rng(3).standard_normal(num_blocks * BLOCK_BYTES // 2)
    bits = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Region(bits.view(np.uint8).reshape(num_blocks, BLOCK_BYTES))


def slot_bytes(name: str) -> int:
    size = make_codec(name, LAYOUT).encoded_bytes
    return BLOCK_BYTES if name == "lossless" else -(-size // PAGE) * PAGE


def make_tier(kind: str, name: str, folder: Path, *, is_steady: bool = True) -> CodedTier:
    width = slot_bytes(name)
    if kind == "disk":
        store = DiskTier(folder / f"{name}.kv", NUM_SLOTS, width, name)
    elif kind == "emulated":
        store = EmulatedTier(NUM_SLOTS, width)
    else:
        store = MemoryTier(NUM_SLOTS, width)
    return CodedTier(store, make_codec(name, LAYOUT), is_steady=is_steady)


def names(count: int) -> list[BlockHash]:
    return [BlockHash(bytes([i + 1]) * 16) for i in range(count)]


def digests_of(pool: Region, ids: list[int]) -> tuple[Digest, ...]:
    return take_digests(pool.blocks, map(BlockId, ids))


def through(name: str, pool: Region, ids: list[int]) -> np.ndarray:
    """What a codec makes of blocks."""
    codec = make_codec(name, LAYOUT)
    encoded = np.zeros((len(ids), codec.encoded_bytes), np.uint8)
    landed = np.zeros((len(ids), BLOCK_BYTES), np.uint8)
    codec.encode(pool.blocks, ids, encoded)
    codec.decode(encoded, landed, range(len(ids)))
    return landed


def flip(tier: CodedTier, slot: int) -> None:
    """Change one bit of a slot behind everybody's back."""
    if isinstance(tier.store, MemoryTier):
        tier.store.region.blocks[slot, 9] ^= 1
    else:
        row = Region(np.zeros((1, PAGE * 4), np.uint8)[:, : tier.block_bytes].copy())
        tier.store.read(row, cut([slot], [0]))
        row.blocks[0, 9] ^= 1
        tier.store.write(row, cut([0], [slot]), names(1), [Digest(1)])


@pytest.mark.parametrize("is_steady", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int8", "int4", "lossless"])
def test_blocks_come_back_as_the_codec_makes_them(
    kind: str, name: str, is_steady: bool, tmp_path: Path
):
    pool, tier = make_pool(), make_tier(kind, name, tmp_path, is_steady=is_steady)
    expected, content = through(name, pool, [4, 1, 2]), digests_of(pool, [4, 1, 2])
    down = tier.write(pool, cut([4, 1, 2], [0, 6, 7]), names(3), content)
    assert NO_DIGEST not in down.digests
    assert (down.digests == content) == (name == "lossless")
    assert down.codec_ns > 0
    up = tier.read(pool, cut([0, 6, 7], [9, 10, 8]), down.digests)
    assert (pool.blocks[[9, 10, 8]] == expected).all()
    assert up.digests == digests_of(pool, [9, 10, 8])
    assert up.codec_ns > 0
    tier.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int8", "lossless"])
def test_a_flipped_bit_costs_its_own_block_alone(kind: str, name: str, tmp_path: Path):
    pool, tier = make_pool(), make_tier(kind, name, tmp_path)
    content = digests_of(pool, [0, 1, 2])
    down = tier.write(pool, cut([0, 1, 2], [3, 4, 5]), names(3), content)
    expected = through(name, pool, [0, 2])
    flip(tier, 4)
    up = tier.read(pool, cut([3, 4, 5], [6, 7, 8]), down.digests)
    assert (pool.blocks[[6, 8]] == expected).all()
    assert up.digests[0] == digests_of(pool, [6])[0]
    assert up.digests[2] == digests_of(pool, [8])[0]
    # A lossless block may still decode, and is another then: whoever asked compares.
    assert up.digests[1] == NO_DIGEST or (name == "lossless" and up.digests[1] != content[1])
    tier.close()


def test_what_a_lossless_codec_makes_no_smaller_does_not_go_in():
    noise = np.random.default_rng(5).integers(0, 256, (3, BLOCK_BYTES), np.uint8)
    pool = make_pool()
    pool.blocks[1:2] = noise[:1]
    tier = CodedTier(MemoryTier(NUM_SLOTS, BLOCK_BYTES), make_codec("lossless", LAYOUT))
    content = digests_of(pool, [0, 1, 2])
    down = tier.write(pool, cut([0, 1, 2], [0, 1, 2]), names(3), content)
    assert down.digests == (content[0], NO_DIGEST, content[2])
    up = tier.read(pool, cut([0, 2], [6, 7]), [content[0], content[2]])
    assert up.digests == (content[0], content[2])


def test_more_blocks_than_a_batch_keep_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("penstock.transport.coded.STAGING_BYTES", 2 * BLOCK_BYTES)
    pool = make_pool()
    tier = CodedTier(
        MemoryTier(NUM_SLOTS, slot_bytes("int8")), make_codec("int8", LAYOUT), is_steady=False
    )
    ids, slots = [0, 1, 2, 4, 3], [4, 2, 3, 0, 7]
    down = tier.write(pool, cut(ids, slots), names(5), digests_of(pool, ids))
    expected = through("int8", pool, ids)
    up = tier.read(pool, cut(slots, [6, 7, 8, 9, 10]), down.digests)
    assert (pool.blocks[6:11] == expected).all()
    assert up.digests == digests_of(pool, [6, 7, 8, 9, 10])


def move(ends: TierEnds, spans: list[Span], digests: tuple[Digest, ...]) -> Move:
    return Move(
        move_id=1,
        kind=MoveClass.OFFLOAD,
        request_id=RequestId(""),
        source=WorkerId("w"),
        epoch=1,
        spans=(tuple(spans),),
        digests=(digests,),
        tiers=ends,
    )


@pytest.mark.parametrize(
    ("near", "far"), [("int8", "int8"), ("int8", ""), ("", "int8"), ("lossless", "int8")]
)
def test_blocks_sink_from_any_codec_to_any_other(near: str, far: str, tmp_path: Path):
    pool = make_pool()

    def make(kind: str, name: str) -> CodedTier | MemoryTier:
        return make_tier(kind, name, tmp_path) if name else MemoryTier(NUM_SLOTS, BLOCK_BYTES)

    tiers = {"near": make("memory", near), "far": make("disk" if far else "memory", far)}
    mover = TierMover(pool, tiers)

    def run(source: str, destination: str, ids: list[int], to: list[int], known: tuple) -> tuple:
        spans = align([BlockId(i) for i in ids], [BlockId(i) for i in to])
        done = mover.execute(move(TierEnds(source, destination, tuple(names(2))), spans, known))
        assert done.error is None
        (digests,) = done.digests
        return digests

    expected = through("int8", pool, [1, 2])
    there = run("", "near", [1, 2], [5, 6], digests_of(pool, [1, 2]))
    there = run("near", "far", [5, 6], [0, 3], there)
    landed = run("far", "", [0, 3], [8, 10], there)
    assert (pool.blocks[[8, 10]] == expected).all()
    assert landed == digests_of(pool, [8, 10])


def test_spans_are_flattened_in_their_order():
    sources, slots = flatten(cut([4, 5, 1], [0, 1, 7]))
    assert (sources.tolist(), slots.tolist()) == ([4, 5, 1], [0, 1, 7])
    assert flatten(cut([], []))[0].tolist() == []
