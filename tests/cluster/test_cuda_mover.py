"""The block mover of workers whose pools are on GPUs, by a double of the driver's library."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Move, MoveClass, Reshape, Span
from penstock.core.messages import GroupBlocks
from penstock.engine.device_digest import DeviceDigests
from penstock.transfer.digest import take_digests
from penstock.transfer.generation import COUNTER_BYTES, counters
from penstock.transfer.region import Region
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import CudaIpc, describe
from penstock.transport.mover import BlockMover
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.verify import verified_by
from tests.transport import test_mover
from tests.transport.cuda_double import allocate, build_double, memory
from tests.transport.test_mover import NUM_BLOCKS, PEER, move

LAYOUT = msgspec.structs.replace(test_mover.LAYOUT, head_dim=16)
SIZES = list(zip(NUM_BLOCKS, LAYOUT.block_bytes, strict=True))
DEVICE = 1

PREFILL = """
import os, sys
import msgspec
import numpy as np
from penstock.transfer.generation import COUNTER_BYTES, counters
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import describe
from penstock.transport.shm import SharedPool
from tests.transport.cuda_double import allocate, memory
from tests.cluster.test_cuda_mover import DEVICE, NUM_BLOCKS, SIZES, contents, info_of

driver, regions = CudaDriver(sys.argv[1]), allocate(sys.argv[1], DEVICE, SIZES)
for group, region in enumerate(regions):
    memory(region)[:] = contents(group)
pools = [SharedPool(count, COUNTER_BYTES) for count in NUM_BLOCKS]
for pool in pools:
    counters(pool.region.blocks)[:] = 7
described = [describe(driver, region, os.getpid()) for region in regions]
described += [pool.descriptor for pool in pools]
print(msgspec.json.encode(info_of((), regions=tuple(described))).decode(), flush=True)
for line in sys.stdin:
    counters(pools[0].region.blocks)[int(line)] += 1
    print("anew", flush=True)
"""


def info_of(pools, regions=None) -> WorkerInfo:
    return test_mover.info_of(pools, layout=LAYOUT, regions=regions)


def contents(group: int) -> np.ndarray:
    rng = np.random.default_rng(group)
    return rng.integers(0, 256, SIZES[group], np.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    return str(build_double(tmp_path_factory.mktemp("double")))


@pytest.fixture
def prefill(library):
    """A worker's process: two groups on a GPU, all blocks handed out seven times."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREFILL, library],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def regions(library):
    regions = allocate(library, DEVICE, SIZES)
    for region in regions:
        memory(region)[:] = 0
    return regions


@pytest.fixture
def mover(library, regions):
    return BlockMover(LAYOUT, regions, [CudaIpc(CudaDriver(library), DEVICE), SharedMemory()])


def info_from(process) -> WorkerInfo:
    return msgspec.json.decode(process.stdout.readline(), type=WorkerInfo)


def handoff(generations=(7, 7, 7), digests=()) -> Move:
    """Blocks 2, 3 and 9 of the first group, and block 0 of the second."""
    return msgspec.structs.replace(
        move([Span(2, 0, 2), Span(9, 7, 1)], [Span(0, 5, 1)]),
        generations=(generations, (7,)),
        digests=digests,
    )


def test_a_hand_off_crosses_on_the_device_and_counters_by_shared_memory(mover, regions, prefill):
    mover.add_peer(info_from(prefill))
    done = mover.execute(handoff())
    assert done.error is None
    assert (done.num_spans, done.transport) == (3, "cuda_ipc")
    assert done.num_bytes == 3 * LAYOUT.block_bytes[0] + LAYOUT.block_bytes[1]
    assert (memory(regions[0])[[0, 1, 7]] == contents(0)[[2, 3, 9]]).all()
    assert not memory(regions[0])[[2, 3, 4, 5, 6, 8, 9, 10, 11]].any()
    assert (memory(regions[1])[5] == contents(1)[0]).all()


def test_a_block_that_was_handed_out_anew_is_seen(mover, prefill):
    mover.add_peer(info_from(prefill))
    print("3", file=prefill.stdin, flush=True)
    assert prefill.stdout.readline() == "anew\n"
    done = mover.execute(handoff())
    assert done.is_stale
    assert "anew" in done.error


def test_digests_on_the_device_are_the_owners(mover, regions, prefill):
    mover.add_peer(info_from(prefill))
    pools = [torch.from_numpy(memory(region)) for region in regions]
    execute = verified_by(mover.execute, [DeviceDigests(pool).take for pool in pools])
    digests = take_digests(contents(0), [2, 3, 9]), take_digests(contents(1), [0])
    with np.errstate(all="ignore"):
        right = execute(handoff(digests=digests))
        assert (right.error, right.is_corrupt) == (None, False)
        wrong = execute(handoff(digests=((digests[0][0], 1, digests[0][2]), digests[1])))
    assert (wrong.error, wrong.is_corrupt) == (None, True)


def test_an_owner_that_ended_is_an_error(mover, regions, prefill):
    mover.add_peer(info_from(prefill))
    assert mover.execute(handoff()).error is None
    prefill.kill()
    prefill.wait()
    assert "is gone" in mover.execute(handoff()).error


def test_blocks_are_relocated_within_the_device(mover, regions):
    memory(regions[0])[:] = contents(0)
    asked = msgspec.structs.replace(
        move([Span(4, 10, 2), Span(0, 9, 1)], []), kind=MoveClass.RELOCATE
    )
    done = mover.execute(asked)
    assert done.error is None
    assert (memory(regions[0])[[10, 11, 9]] == contents(0)[[4, 5, 0]]).all()
    assert (memory(regions[0])[:9] == contents(0)[:9]).all()


def test_a_peer_in_the_hosts_memory_is_not_pulled_onto_the_device(mover, regions):
    pools = [SharedPool(count, size) for count, size in SIZES]
    mover.add_peer(info_of(pools))
    done = mover.execute(move([Span(0, 0, 1)], []))
    assert "shm does not lead into the memory of a GPU" in done.error
    for pool in pools:
        pool.close()


def test_what_a_gpu_does_not_do_is_an_error_and_moves_nothing(mover, regions, prefill):
    mover.add_peer(info_from(prefill))
    pushed = msgspec.structs.replace(handoff(), destination=PEER)
    assert "does not write" in mover.execute(pushed).error
    wanted = Reshape(source=GroupBlocks(0, (5,)), destination=GroupBlocks(0, (2,)), begin=0, end=4)
    none = Reshape(source=GroupBlocks(0, ()), destination=GroupBlocks(0, ()), begin=0, end=0)
    reshaped = msgspec.structs.replace(move([], []), reshapes=(wanted, none))
    assert "one shape on both sides" in mover.execute(reshaped).error
    assert not memory(regions[0]).any()


def test_a_worker_without_a_gpu_says_why_it_does_not_reach_one(library, regions):
    mover = BlockMover(LAYOUT, [Region(np.zeros(size, np.uint8)) for size in SIZES])
    driver = CudaDriver(library)
    described = tuple(describe(driver, region, os.getpid()) for region in regions)
    mover.add_peer(info_of((), regions=described))
    assert "cuda_ipc memory cannot be mapped" in mover.execute(move([Span(0, 0, 1)], [])).error


def test_counters_of_a_gpus_blocks_are_the_hosts(prefill):
    described = info_from(prefill).regions
    assert [region.kind for region in described[:2]] == ["cuda_ipc"] * 2
    assert {region.block_bytes for region in described[2:]} == {COUNTER_BYTES}
    assert counters(np.zeros((2, COUNTER_BYTES), np.uint8)).shape == (2,)
