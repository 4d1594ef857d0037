from pathlib import Path

import msgspec
import numpy as np
import pytest

from penstock.core.block import KVGroup, KVLayout
from penstock.core.descriptors import RegionDescriptor, WorkerInfo
from penstock.core.events import Move, MoveClass, Reshape, Span
from penstock.core.messages import GroupBlocks
from penstock.core.types import Role, WorkerId
from penstock.transfer.digest import take_digests
from penstock.transfer.region import Region
from penstock.transport.mover import BlockMover
from penstock.transport.shm import HOST_KIND, MEMFD, SharedPool

LAYOUT = KVLayout("test", (KVGroup((0, 1)), KVGroup((2,), window=8)), 1, 4, 4, "float32")
NUM_BLOCKS = (12, 6)
PEER = WorkerId("prefill-0")


@pytest.fixture
def pools():
    pools = [SharedPool(n, b) for n, b in zip(NUM_BLOCKS, LAYOUT.block_bytes, strict=True)]
    for pool in pools:
        pool.region.blocks[:] = np.arange(pool.region.num_blocks)[:, None] + 1
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def regions():
    sizes = zip(NUM_BLOCKS, LAYOUT.block_bytes, strict=True)
    return [Region(np.zeros(size, np.uint8)) for size in sizes]


@pytest.fixture
def mover(regions):
    return BlockMover(LAYOUT, regions)


def info_of(pools, epoch=1, layout=LAYOUT, regions=None):
    return WorkerInfo(
        worker_id=PEER,
        role=Role.PREFILL,
        epoch=epoch,
        address="",
        pid=0,
        layout=layout,
        num_blocks=NUM_BLOCKS,
        max_model_len=64,
        max_num_seqs=4,
        regions=tuple(p.descriptor for p in pools) if regions is None else regions,
    )


def move(*spans, epoch=1):
    return Move(
        move_id=5,
        kind=MoveClass.HANDOFF,
        request_id="r",
        source=PEER,
        epoch=epoch,
        spans=tuple(map(tuple, spans)),
    )


def assert_refused(mover, regions, asked, match):
    done = mover.execute(asked)
    assert match in done.error
    assert (done.move_id, done.num_bytes, done.num_spans) == (5, 0, 0)
    assert not any(region.blocks.any() for region in regions)


def test_copies_the_spans_of_every_group(mover, regions, pools):
    mover.add_peer(info_of(pools))

    done = mover.execute(move([Span(2, 0, 3), Span(9, 7, 1)], [Span(0, 5, 1)]))

    assert done.error is None
    assert regions[0].blocks[:, 0].tolist() == [3, 4, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0]
    assert regions[1].blocks[:, -1].tolist() == [0, 0, 0, 0, 0, 1]
    assert done.num_bytes == 4 * LAYOUT.block_bytes[0] + LAYOUT.block_bytes[1]
    assert (done.move_id, done.num_spans, done.transport) == (5, 3, "shm")
    assert 0 < done.started_ns <= done.finished_ns


def test_a_peer_that_nobody_introduced_is_refused(mover, regions):
    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "no peer prefill-0")


@pytest.mark.parametrize("epoch", [0, 2])
def test_another_incarnation_is_refused(mover, regions, pools, epoch):
    mover.add_peer(info_of(pools))

    assert_refused(mover, regions, move([Span(0, 0, 1)], [], epoch=epoch), "epoch 1")


def test_another_layout_is_refused(mover, regions, pools):
    other = msgspec.structs.replace(LAYOUT, model="other weights")
    mover.add_peer(info_of(pools, layout=other))

    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "another layout")

    assert_refused(mover, regions, move([Span(0, 0, 1)], []), LAYOUT.fingerprint())
    assert_refused(mover, regions, move([Span(0, 0, 1)], []), other.fingerprint())


SMALLER = msgspec.structs.replace(LAYOUT, block_size=2)


@pytest.fixture
def smaller_pools():
    pools = [SharedPool(n, b) for n, b in zip((24, 12), SMALLER.block_bytes, strict=True)]
    for pool in pools:
        pool.region.blocks[:] = np.arange(pool.region.num_blocks)[:, None] + 1
    yield pools
    for pool in pools:
        pool.close()


def reshaping(pools, begin=0, end=7):
    """Tokens out of blocks 5, 6, 1 and 0 into our blocks 2 and 3, and nothing of the window."""
    ids = (5, 6, 1, 0)
    source = GroupBlocks(0, ids, take_digests(pools[0].region.blocks, ids))
    wanted = Reshape(source, GroupBlocks(0, (2, 3)), begin, end)
    nothing = Reshape(GroupBlocks(0, ()), GroupBlocks(0, ()), end, end)
    return msgspec.structs.replace(move(), reshapes=(wanted, nothing))


def test_blocks_of_another_size_are_reshaped(mover, regions, smaller_pools):
    mover.add_peer(info_of(smaller_pools, layout=SMALLER))

    done = mover.execute(reshaping(smaller_pools))

    assert (done.error, done.is_corrupt, done.transport) == (None, False, "shm")
    slots = regions[0].blocks[2:4].reshape(2, 4, 4, -1)[:, 0, :, 0]
    assert slots.tolist() == [[6, 6, 7, 7], [2, 2, 1, 0]]
    assert (done.num_bytes, done.num_spans) == (4 * SMALLER.block_bytes[0], 3)
    # Of our two blocks the second is not full yet.
    assert done.digests == (take_digests(regions[0].blocks, [2]), ())
    assert not regions[0].blocks[:2].any()
    assert not regions[1].blocks.any()


def test_what_is_not_as_offered_is_corrupt(mover, regions, smaller_pools):
    mover.add_peer(info_of(smaller_pools, layout=SMALLER))
    asked = reshaping(smaller_pools)
    smaller_pools[0].region.blocks[1, -1] ^= 1

    done = mover.execute(asked)

    assert (done.error, done.is_corrupt) == (None, True)
    assert not any(region.blocks.any() for region in regions)


def test_a_reshape_from_a_peer_that_lacks_heads_of_ours_is_refused(mover, regions, smaller_pools):
    shard = msgspec.structs.replace(SMALLER, first_kv_head=1, total_kv_heads=2)
    ours = msgspec.structs.replace(LAYOUT, total_kv_heads=2)
    mover = BlockMover(ours, regions)
    mover.add_peer(info_of(smaller_pools, layout=shard))
    assert_refused(mover, regions, reshaping(smaller_pools), "holds KV heads")


def test_a_reshape_that_cannot_be_is_refused(mover, regions, smaller_pools):
    other = msgspec.structs.replace(SMALLER, model="other weights")
    mover.add_peer(info_of(smaller_pools, layout=other))
    assert_refused(mover, regions, reshaping(smaller_pools), other.fingerprint())

    mover.add_peer(info_of(smaller_pools, layout=SMALLER))
    assert_refused(mover, regions, reshaping(smaller_pools, end=9), "tokens 0 to 9")
    one = reshaping(smaller_pools).reshapes[:1]
    asked = msgspec.structs.replace(move(), reshapes=one)
    assert_refused(mover, regions, asked, "1 reshapes for 2 groups")
    far = Reshape(GroupBlocks(0, (24,)), GroupBlocks(0, (0,)), 0, 1)
    asked = msgspec.structs.replace(move(), reshapes=(far, one[0]))
    assert_refused(mover, regions, asked, "block 24 is none")


@pytest.mark.parametrize("bad", [Span(11, 0, 2), Span(0, 11, 2), Span(-1, 0, 1)])
def test_one_span_out_of_bounds_stops_the_whole_move(mover, regions, pools, bad):
    mover.add_peer(info_of(pools))

    assert_refused(mover, regions, move([Span(0, 0, 1), bad], [Span(0, 0, 1)]), "Span")


def test_a_move_for_other_groups_is_refused(mover, regions, pools):
    mover.add_peer(info_of(pools))

    assert_refused(mover, regions, move([Span(0, 0, 1)]), "1 groups of spans")


def test_regions_that_do_not_fit_the_layout_are_refused(mover, regions, pools):
    mover.add_peer(info_of(pools, regions=(pools[0].descriptor,)))
    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "1 regions")

    mover.add_peer(info_of(pools, regions=(pools[1].descriptor, pools[0].descriptor)))
    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "another size")


def test_memory_of_an_unknown_kind_is_refused(mover, regions, pools):
    strange = RegionDescriptor("carrier pigeon", "", 64, 64)
    mover.add_peer(info_of(pools, regions=(strange, strange)))

    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "carrier pigeon")


def test_a_pool_that_is_gone_is_refused(mover, regions, pools):
    mover.add_peer(info_of(pools))
    pools[0].close()

    assert_refused(mover, regions, move([Span(0, 0, 1)], []), "cannot be opened")


def test_pools_are_mapped_when_they_are_needed(mover, regions, pools):
    mover.add_peer(info_of(pools))
    pools[1].close()

    assert mover.execute(move([Span(0, 0, 1)], [])).error is None
    assert mover.execute(move([], [Span(0, 0, 1)])).error is not None


def test_a_new_incarnation_takes_the_place_of_the_old(mover, regions, pools):
    mover.add_peer(info_of(pools))
    mover.execute(move([Span(0, 0, 1)], []))

    mover.add_peer(info_of(pools, epoch=2))
    mover.forget(PEER, epoch=1)

    assert mover.execute(move([Span(0, 0, 1)], [], epoch=2)).error is None
    assert mover.execute(move([Span(0, 0, 1)], [], epoch=1)).error is not None


@pytest.mark.skipif(HOST_KIND != MEMFD, reason="reads /proc")
def test_a_forgotten_peer_is_unmapped(mover, pools):
    mover.add_peer(info_of(pools))
    mover.execute(move([Span(0, 0, 1)], [Span(0, 0, 1)]))
    mapped = num_mapped(pools)

    mover.forget(PEER, epoch=1)

    assert mapped == 4  # ours, and once more as the peer's
    assert num_mapped(pools) == 2


def num_mapped(pools):
    tokens = [pool.descriptor.location.split(":")[2] for pool in pools]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(any(token in line for token in tokens) for line in lines)


def test_own_regions_of_another_layout_are_a_bug(regions):
    with pytest.raises(AssertionError):
        BlockMover(LAYOUT, regions[::-1])


def test_blocks_are_relocated_within_the_own_pools(mover, regions):
    regions[0].blocks[3:5] = before = np.arange(1, 3, dtype=np.uint8)[:, None]
    relocate = msgspec.structs.replace(move([Span(3, 8, 2)], []), kind=MoveClass.RELOCATE)

    done = mover.execute(relocate)

    assert (done.error, done.num_spans) == (None, 1)
    assert (regions[0].blocks[8:10] == before).all()
    outside = msgspec.structs.replace(move([Span(3, 10_000, 2)], []), kind=MoveClass.RELOCATE)
    assert "leaves the destination" in mover.execute(outside).error
