"""Moves between a pool on a GPU and its tiers, by a double of the driver's library."""

import ctypes
from functools import partial

import numpy as np
import pytest

from penstock.core.errors import BackendUnavailable, DeadlineExceeded
from penstock.core.events import Span, TierEnds
from penstock.core.types import NO_DIGEST, BlockHash, BlockId
from penstock.transfer.digest import take_digests
from penstock.transport import device_tiers
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.device_tiers import DeviceTierMover
from penstock.transport.tier import MemoryTier
from tests.transport.cuda_double import allocate, build_double, memory
from tests.transport.test_tier_mover import FullDisk, move

NUM_BLOCKS, BLOCK_BYTES = 12, 4096
NAMES = tuple(BlockHash(bytes([i]) * 16) for i in range(8))


class Far(MemoryTier):
    """Slots that the device does not copy itself."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    return str(build_double(tmp_path_factory.mktemp("double")))


@pytest.fixture
def pool(library):
    (region,) = allocate(library, 0, [(NUM_BLOCKS, BLOCK_BYTES)])
    rng = np.random.default_rng(0)
    memory(region)[:] = rng.integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
    return region


@pytest.fixture
def make_mover(library, pool):
    made = []

    def make(tiers, **options):
        take = partial(take_digests, memory(pool))
        made.append(DeviceTierMover(pool, tiers, take, lambda: CudaDriver(library), **options))
        return made[-1]

    yield make
    for mover in made:
        mover.close()
    assert ctypes.CDLL(library).double_pinned() == 0


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


def spans(*rows: tuple[int, int, int]) -> list[Span]:
    return [Span(BlockId(start), BlockId(to), count) for start, to, count in rows]


@pytest.mark.parametrize("kind", [MemoryTier, Far])
def test_blocks_go_down_and_come_up_again(make_mover, pool, kind, monkeypatch):
    monkeypatch.setattr(device_tiers, "STAGING_BYTES", 3 * BLOCK_BYTES)
    tier = kind(8, BLOCK_BYTES)
    mover, blocks = make_mover({"dram": tier}), memory(pool)
    wanted = blocks[[2, 3, 4, 5, 9]].copy()
    digests = take_digests(blocks, ids(2, 3, 4, 5, 9))
    down = move(TierEnds("", "dram", NAMES[:5]), *spans((2, 1, 4), (9, 7, 1)), digests=digests)
    done = mover.execute(down)
    assert (done.error, done.num_bytes, done.num_spans) == (None, 5 * BLOCK_BYTES, 2)
    assert done.digests == (digests,)
    assert done.transport == "dram"
    assert (tier.region.blocks[[1, 2, 3, 4, 7]] == wanted).all()
    assert not tier.region.blocks[[0, 5, 6]].any()
    blocks[:] = 0
    up = mover.execute(move(TierEnds("dram", ""), *spans((7, 0, 1), (1, 6, 4)), digests=digests))
    assert (up.error, up.num_spans) == (None, 2)
    assert (blocks[[6, 7, 8, 9, 0]] == wanted).all()
    assert not blocks[[1, 2, 3, 4, 5, 10, 11]].any()
    assert up.digests == ((digests[4], *digests[:4]),)


def test_digests_of_what_came_up_are_those_of_what_is_there(make_mover, pool):
    tier = MemoryTier(4, BLOCK_BYTES)
    mover, blocks = make_mover({"dram": tier}), memory(pool)
    digests = take_digests(blocks, ids(0, 1))
    mover.execute(move(TierEnds("", "dram", NAMES[:2]), *spans((0, 0, 2)), digests=digests))
    tier.region.blocks[1, 77] ^= 1
    (found,) = mover.execute(move(TierEnds("dram", ""), *spans((0, 4, 2)))).digests
    assert found[0] == digests[0]
    assert found[1] == take_digests(blocks, ids(5))[0] != digests[1]


def test_blocks_sink_without_the_device(make_mover, pool):
    tiers = {"near": MemoryTier(4, BLOCK_BYTES), "far": Far(4, BLOCK_BYTES)}
    mover, digests = make_mover(tiers), take_digests(memory(pool), ids(6))
    mover.execute(move(TierEnds("", "near", NAMES[:1]), *spans((6, 2, 1)), digests=digests))
    sink = move(TierEnds("near", "far", NAMES[:1]), *spans((2, 3, 1)), digests=digests)
    assert mover.execute(sink).error is None
    assert (tiers["far"].region.blocks[3] == memory(pool)[6]).all()


def test_a_full_disk_is_an_error(make_mover, monkeypatch):
    monkeypatch.setattr(device_tiers, "STAGING_BYTES", 2 * BLOCK_BYTES)
    mover = make_mover({"disk": FullDisk(8, BLOCK_BYTES)})
    digests = tuple([NO_DIGEST] * 5)
    down = move(TierEnds("", "disk", NAMES[:5]), *spans((0, 0, 5)), digests=digests)
    done = mover.execute(down)
    assert "No space left" in done.error
    assert done.digests == ()


def test_moves_of_several_threads_have_their_own_lane(make_mover, pool):
    mover = make_mover({"dram": MemoryTier(4, BLOCK_BYTES)})
    one, other = mover._new_lane(), mover._new_lane()
    assert one.driver is not other.driver
    assert one.staging.address != other.staging.address


def test_memory_that_cannot_be_pinned_is_said_at_once(make_mover, monkeypatch):
    monkeypatch.setenv("DOUBLE_UNPINNABLE", "1")
    with pytest.raises(BackendUnavailable, match="cuMemHostRegister_v2"):
        make_mover({"dram": MemoryTier(4, BLOCK_BYTES)})


def test_a_device_without_an_end_is_the_workers(library, make_mover):
    mover = make_mover({"dram": MemoryTier(4, BLOCK_BYTES)}, silence_s=0.1)
    cuda = ctypes.CDLL(library)
    cuda.double_stick(1)
    try:
        with pytest.raises(DeadlineExceeded, match="to or from the host"):
            mover.execute(
                move(TierEnds("", "dram", NAMES[:1]), *spans((0, 0, 1)), digests=(NO_DIGEST,))
            )
    finally:
        cuda.double_stick(0)


def test_slots_that_are_not_there_are_a_bug(make_mover):
    mover = make_mover({"dram": MemoryTier(4, BLOCK_BYTES)})
    with pytest.raises(AssertionError, match="leaves the source"):
        mover.execute(move(TierEnds("dram", ""), *spans((3, 0, 2))))
