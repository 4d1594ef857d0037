"""The CXL tier: which node it is on, and that an emulated one says so and keeps to its rate."""

import time
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import StartupFailed
from penstock.transfer.plan import cut
from penstock.transfer.region import Region
from penstock.transport.cxl import (
    EmulatedTier,
    NodeTier,
    cxl_kind,
    find_node,
    open_cxl,
    parse_nodes,
)


def test_a_node_with_memory_and_no_core_is_found(tmp_path: Path):
    (tmp_path / "has_memory").write_text("0-2\n")
    (tmp_path / "has_cpu").write_text("0,1\n")
    assert find_node(tmp_path) == 2
    (tmp_path / "has_cpu").write_text("0-2\n")
    assert find_node(tmp_path) is None
    assert find_node(tmp_path / "nowhere") is None


def test_lists_of_nodes():
    assert parse_nodes("0-2,5\n") == {0, 1, 2, 5}
    assert parse_nodes("\n") == set()


def test_an_emulated_tier_says_so_and_is_no_faster_than_its_rate():
    pool = Region(np.random.default_rng(1).integers(0, 256, (4, 4096), np.uint8))
    tier = EmulatedTier(4, 4096, bytes_per_s=2 * 4096 * 50, latency_ns=0)
    assert tier.kind == "cxl (emulated)"
    started_ns = time.monotonic_ns()
    tier.write(pool, cut([0, 1], [2, 3]), (), ())
    tier.read(pool, cut([2, 3], [2, 3]))
    assert time.monotonic_ns() - started_ns >= 40_000_000
    assert (pool.blocks[2:] == pool.blocks[:2]).all()
    tier.close()


def test_a_tier_on_a_node_is_bound_to_it_and_a_node_that_is_not_there_is_refused():
    if parse_nodes(Path("/sys/devices/system/node/has_memory").read_text()) >= {0}:
        tier = NodeTier(4, 4096, 0)
        tier.region.blocks[:] = 1
        assert tier.kind == "cxl (node 0)"
        tier.close()
    with pytest.raises(StartupFailed, match="NUMA node 63"):
        NodeTier(4, 4096, 63)


def test_what_this_machine_has_is_opened():
    tier = open_cxl(2, 4096)
    assert ("emulated" in tier.kind) == (find_node() is None)
    assert tier.kind == cxl_kind()
    tier.close()
