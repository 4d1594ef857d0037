"""The tier in DRAM: what goes in comes out."""

import numpy as np

from penstock.transfer.plan import cut
from penstock.transfer.region import Region
from penstock.transport.tier import MemoryTier


def test_blocks_come_back_as_they_went_in():
    rng = np.random.default_rng(1)
    pool = Region(rng.integers(0, 256, (8, 4096), np.uint8))
    before = pool.blocks.copy()
    tier = MemoryTier(16, 4096)
    tier.write(pool, cut([1, 2, 5], [7, 8, 0]), (), ())
    pool.blocks[:] = 0
    tier.read(pool, cut([7, 8, 0], [3, 4, 6]))
    assert (pool.blocks[[3, 4, 6]] == before[[1, 2, 5]]).all()
    assert not pool.blocks[[0, 1, 2, 5, 7]].any()
    assert tier.contents() == []
    tier.close()
