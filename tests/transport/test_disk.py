"""The tier on disk: what goes in comes out, also after a restart; torn, cut and full files."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import StartupFailed
from penstock.core.types import BlockHash, BlockId, Digest
from penstock.transfer.digest import take_digests
from penstock.transfer.plan import cut
from penstock.transfer.region import Region
from penstock.transport.disk import PAGE_BYTES, RECORD, DiskTier
from penstock.transport.shm import SharedPool

NAMES = tuple(BlockHash(bytes([i]) * 16) for i in range(1, 9))


def open_tier(
    path: Path, *, block_bytes: int = 4096, num_slots: int = 8, of: str = "a"
) -> DiskTier:
    return DiskTier(path, num_slots, block_bytes, of)


def filled(block_bytes: int, num_blocks: int = 8) -> Region:
    region = SharedPool(num_blocks, block_bytes).region
    region.blocks[:] = np.random.default_rng(2).integers(0, 256, region.blocks.shape, np.uint8)
    return region


def put(tier: DiskTier, pool: Region, block_ids: list[int], slots: list[int]) -> list[Digest]:
    ids = [BlockId(i) for i in block_ids]
    digests = take_digests(pool.blocks, ids)
    tier.write(pool, cut(ids, [BlockId(s) for s in slots]), NAMES[: len(ids)], digests)
    return list(digests)


@pytest.mark.parametrize("block_bytes", [4096, 8192, 1000])
def test_blocks_come_back_as_they_went_in_also_after_a_restart(tmp_path: Path, block_bytes: int):
    pool = filled(block_bytes)
    before = pool.blocks.copy()
    tier = open_tier(tmp_path / "kv", block_bytes=block_bytes)
    assert not tier.is_direct or block_bytes % PAGE_BYTES == 0
    digests = put(tier, pool, [1, 2, 5], [6, 7, 0])
    tier.close()
    tier = open_tier(tmp_path / "kv", block_bytes=block_bytes)
    kept = {k.name: (k.slot, k.digest) for k in tier.contents()}
    assert kept == dict(zip(NAMES[:3], zip([6, 7, 0], digests, strict=True), strict=True))
    pool.blocks[:] = 0
    tier.read(pool, cut([6, 7, 0], [3, 4, 6]))
    assert (pool.blocks[[3, 4, 6]] == before[[1, 2, 5]]).all()
    tier.close()


def test_memory_that_does_not_begin_at_a_page_goes_through_the_cache(tmp_path: Path):
    memory = np.random.default_rng(3).integers(0, 256, 4 * 4096 + 1, np.uint8)
    start = 1 if memory.__array_interface__["data"][0] % 2 == 0 else 0
    pool = Region(memory[start : start + 4 * 4096].reshape(4, 4096))
    before = pool.blocks.copy()
    tier = open_tier(tmp_path / "kv")
    put(tier, pool, [0, 1], [2, 3])
    tier.read(pool, cut([2, 3], [2, 3]))
    assert (pool.blocks[2:] == before[:2]).all()
    tier.close()


def test_a_file_of_another_layout_starts_afresh(tmp_path: Path):
    tier = open_tier(tmp_path / "kv", of="a")
    put(tier, filled(4096), [0], [0])
    tier.close()
    tier = open_tier(tmp_path / "kv", of="b")
    assert tier.contents() == []
    tier.close()


def test_a_torn_record_and_a_record_at_another_slot_are_no_blocks(tmp_path: Path):
    path = tmp_path / "kv"
    tier = open_tier(path)
    put(tier, filled(4096), [0, 1, 2], [0, 1, 2])
    tier.close()
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        records = np.frombuffer(file.read(3 * RECORD.itemsize), RECORD).copy()
        records["digest"][0] ^= 1
        records[2] = records[1]
        file.seek(PAGE_BYTES)
        file.write(records.tobytes())
    tier = open_tier(path)
    assert [kept.slot for kept in tier.contents()] == [1]
    tier.close()


def test_a_file_that_was_cut_short_reads_as_zeros_and_is_whole_again(tmp_path: Path):
    path = tmp_path / "kv"
    pool = filled(4096)
    tier = open_tier(path)
    size = path.stat().st_size
    digests = put(tier, pool, [0, 1, 2], [5, 6, 7])
    os.truncate(path, size - 4096)
    tier.read(pool, cut([5, 6, 7], [0, 1, 2]))
    found = take_digests(pool.blocks, [BlockId(0), BlockId(1), BlockId(2)])
    assert [f == d for f, d in zip(found, digests, strict=True)] == [True, True, False]
    assert not pool.blocks[2].any()
    tier.close()
    tier = open_tier(path)
    assert path.stat().st_size == size
    tier.close()


def test_a_write_that_fails_leaves_no_block(tmp_path: Path):
    path = tmp_path / "kv"
    tier = open_tier(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    pool = filled(4096)
    put(tier, pool, [0], [7])
    # What a full disk does to a sparse file: the write is refused (SIGXFSZ is ignored by Python).
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE_BYTES, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            put(tier, pool, [1], [7])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tier.close()
    tier = open_tier(path)
    assert tier.contents() == []
    tier.close()


def test_what_the_disk_cannot_hold_is_refused_at_the_start(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE_BYTES, before[1]))
    try:
        with pytest.raises(StartupFailed, match="ask for less"):
            open_tier(tmp_path / "kv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "kv").stat().st_size == 0


def test_what_is_more_than_is_free_takes_nothing_meanwhile(tmp_path: Path):
    free = os.statvfs(tmp_path)
    num_slots = free.f_blocks * free.f_frsize // 4096
    with pytest.raises(StartupFailed, match="are free"):
        open_tier(tmp_path / "kv", num_slots=num_slots)
    assert (tmp_path / "kv").stat().st_blocks == 0


def test_a_file_has_one_user(tmp_path: Path):
    tier = open_tier(tmp_path / "kv")
    with pytest.raises(StartupFailed, match="in use"):
        open_tier(tmp_path / "kv")
    tier.close()
    open_tier(tmp_path / "kv").close()
