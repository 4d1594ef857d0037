"""A digest tells any wrong bit, and depends on content alone."""

import numpy as np

from penstock.core.events import Move, MoveClass, Span
from penstock.core.types import NO_DIGEST, BlockId, RequestId, WorkerId
from penstock.transfer.digest import is_corrupt, take_digests

RNG = np.random.default_rng(0)


def make_move(digests: tuple[tuple[int, ...], ...]) -> Move:
    return Move(
        move_id=1,
        kind=MoveClass.HANDOFF,
        request_id=RequestId("r"),
        source=WorkerId("p"),
        epoch=1,
        spans=((Span(BlockId(0), BlockId(3), 2),),),
        digests=digests,
    )


def test_equal_content_has_equal_digests_wherever_it_lies() -> None:
    blocks = RNG.integers(0, 256, (6, 4096), dtype=np.uint8)
    blocks[4] = blocks[1]
    digests = take_digests(blocks, map(BlockId, range(6)))
    assert digests[4] == digests[1]
    assert len(set(digests)) == 5
    assert NO_DIGEST not in digests


def test_every_flipped_bit_is_seen() -> None:
    pool = RNG.integers(0, 256, (6, 512), dtype=np.uint8)
    move = make_move((take_digests(pool, [BlockId(3), BlockId(4)]),))
    assert not is_corrupt(move, [pool])
    for block in (3, 4):
        for bit in range(512 * 8):
            pool[block, bit // 8] ^= np.uint8(1 << bit % 8)
            assert is_corrupt(move, [pool]), (block, bit)
            pool[block, bit // 8] ^= np.uint8(1 << bit % 8)
    pool[5] ^= 255  # not of this move
    assert not is_corrupt(move, [pool])


def test_an_offer_without_digests_is_not_compared() -> None:
    pool = RNG.integers(0, 256, (6, 512), dtype=np.uint8)
    assert not is_corrupt(make_move(((),)), [pool])
    assert not is_corrupt(make_move(()), [pool])
