"""Pools on a GPU with all that moves their blocks: a double of the driver, kernels by Triton."""

import numpy as np
import pytest
import torch

from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import Span, TierEnds
from penstock.core.types import NO_DIGEST, BlockHash, BlockId
from penstock.runtime.device_moves import device_moves
from penstock.transfer.digest import take_digests
from penstock.transport.coded import CodedTier
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.device_tiers import DeviceTierMover
from penstock.transport.tier import MemoryTier
from tests.transport.cuda_double import allocate, build_double, memory
from tests.transport.test_tier_mover import move

LAYOUT = KVLayout("m", (KVGroup((0, 1)),), 2, 32, 8, "bfloat16")
NUM_BLOCKS = 6
NAMES = tuple(BlockHash(bytes([i]) * 16) for i in range(4))


@pytest.fixture(autouse=True)
def _no_traps():
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def library(tmp_path) -> str:
    if torch.cuda.is_available():
        pytest.skip("kernels run on a GPU then, and the double's memory is the host's")
    return str(build_double(tmp_path))


@pytest.fixture
def there(library):
    """A pool in the double's memory, as bytes and as a tensor of random numbers."""
    (region,) = allocate(library, 0, [(NUM_BLOCKS, LAYOUT.block_bytes[0])])
    blocks = memory(region)
    pool = torch.from_numpy(blocks).view(torch.bfloat16).view(NUM_BLOCKS, 2, 2, 8, 2, 32)
    torch.manual_seed(0)
    pool[:] = torch.randn(pool.shape).bfloat16()
    return blocks, pool


@pytest.fixture
def moves(library, there):
    def on_device(num_rows, row_bytes):
        return torch.from_numpy(memory(*allocate(library, 0, [(num_rows, row_bytes)])))

    return device_moves([there[1]], make_driver=lambda: CudaDriver(library), allocate=on_device)


def tier_mover(moves, tier) -> DeviceTierMover:
    return DeviceTierMover(
        moves.regions[0], {"dram": tier}, moves.takes[0], moves.make_driver,
        make_codec=moves.make_codec,
    )  # fmt: skip


def test_a_pool_is_described_and_its_digests_are_the_cpus(moves, there):
    blocks, pool = there
    (described,), (region,) = moves.descriptors, moves.regions
    assert (described.kind, described.block_bytes) == ("cuda_ipc", LAYOUT.block_bytes[0])
    assert (region.address, region.num_blocks) == (pool.data_ptr(), NUM_BLOCKS)
    assert moves.takes[0]([BlockId(4), BlockId(1)]) == take_digests(blocks, [4, 1])


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_blocks_are_encoded_on_the_device_and_slots_are_those_of_a_cpu(moves, there, name):
    blocks, _ = there
    before, codec = blocks.copy(), make_codec(name, LAYOUT)
    width = codec.encoded_bytes + 10
    tier = CodedTier(MemoryTier(4, width), codec)
    mover = tier_mover(moves, tier)
    content = take_digests(blocks, [1, 2, 5])
    asked = [Span(BlockId(1), BlockId(2), 2), Span(BlockId(5), BlockId(0), 1)]
    down = mover.execute(move(TierEnds("", "dram", NAMES[:3]), *asked, digests=content))
    assert (down.error, down.transport) == (None, f"dram {name}")
    assert down.codec_ns > 0
    encoded = np.zeros((3, codec.encoded_bytes), np.uint8)
    codec.encode(before, [1, 2, 5], encoded)
    slots = tier.store.region.blocks
    assert (slots[[2, 3, 0], : codec.encoded_bytes] == encoded).all()
    assert down.digests == (take_digests(encoded, [0, 1, 2]),)
    # One of the slots is spoilt: its block stays as it is.
    slots[3, 5] ^= 1
    blocks[:] = 0
    back = [Span(BlockId(2), BlockId(0), 2), Span(BlockId(0), BlockId(4), 1)]
    up = mover.execute(move(TierEnds("dram", ""), *back, digests=down.digests[0]))
    wanted = np.zeros_like(blocks)
    codec.decode(encoded[[0, 2]], wanted, [0, 4])
    assert (blocks == wanted).all()
    first, _, last = take_digests(wanted, [0, 1, 4])
    assert up.digests == ((first, NO_DIGEST, last),)


def test_a_codec_that_the_device_has_not_got_runs_on_the_cpu(moves, there):
    blocks, _ = there
    codec = make_codec("lossless", LAYOUT)
    tier = CodedTier(MemoryTier(4, codec.block_bytes), codec)
    mover = tier_mover(moves, tier)
    assert moves.make_codec("lossless") is None
    before, content = blocks.copy(), take_digests(blocks, [3, 4])
    down = move(TierEnds("", "dram", NAMES[:2]), Span(BlockId(3), BlockId(1), 2), digests=content)
    assert mover.execute(down).digests == (content,)
    blocks[:] = 0
    up = mover.execute(move(TierEnds("dram", ""), Span(BlockId(1), BlockId(0), 2), digests=content))
    assert up.digests == (content,)
    assert (blocks[:2] == before[3:5]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["", "int8", "int4", "fp8"])
def test_on_a_gpu_blocks_go_to_pinned_slots_and_back(name):
    torch.manual_seed(0)
    pool = torch.randn(64, 4, 2, 32, 8, 128, device="cuda").bfloat16()
    layout = KVLayout("m", (KVGroup(tuple(range(4))),), 8, 128, 32, "bfloat16")
    moves = device_moves([pool])
    before = pool.view(64, -1).view(torch.uint8).cpu().numpy()
    tier = MemoryTier(32, layout.block_bytes[0])
    if name:
        codec = make_codec(name, layout)
        tier = CodedTier(MemoryTier(32, codec.encoded_bytes), codec)
    mover, ids = tier_mover(moves, tier), range(32)
    content = take_digests(before, ids)
    assert moves.takes[0](ids) == content
    names = tuple(BlockHash(bytes([i]) * 16) for i in ids)
    whole = Span(BlockId(0), BlockId(0), 32)
    down = mover.execute(move(TierEnds("", "dram", names), whole, digests=content))
    back = Span(BlockId(0), BlockId(32), 32)
    up = mover.execute(move(TierEnds("dram", ""), back, digests=down.digests[0]))
    wanted = before.copy()
    if name:
        encoded = np.zeros((32, codec.encoded_bytes), np.uint8)
        codec.encode(before, ids, encoded)
        assert (tier.store.region.blocks == encoded).all()
        codec.decode(encoded, wanted, range(32, 64))
    else:
        wanted[32:] = before[:32]
    assert (pool.view(64, -1).view(torch.uint8).cpu().numpy() == wanted).all()
    assert up.digests == (take_digests(wanted, range(32, 64)),)
    mover.close()
