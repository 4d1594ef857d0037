"""Digests of a pool on a device, by Triton, in the order asked for and in several turns."""

import numpy as np
import pytest
import torch

from penstock.core.types import NO_DIGEST
from penstock.engine.device_digest import DeviceDigests
from penstock.transfer.digest import take_digests


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _no_traps():
    with np.errstate(all="ignore"):
        yield


def test_more_blocks_than_the_workspace_holds(device):
    torch.manual_seed(0)
    pool = torch.randn(7, 2, 2, 8, 2, 16).to(torch.bfloat16)
    blocks = pool.view(7, -1).view(torch.uint8).numpy()
    digests = DeviceDigests(pool.to(device), workspace_bytes=3 * blocks.shape[1] // 16)
    for block_ids in ([4], [6, 1, 0, 3, 5, 2, 4, 4], range(7), []):
        assert digests.take(block_ids) == take_digests(blocks, block_ids)


def test_content_that_changes_has_another_digest(device):
    pool = torch.zeros(2, 512, dtype=torch.uint8, device=device)
    digests = DeviceDigests(pool)
    before = digests.take([0, 1])
    assert before[0] == before[1] != NO_DIGEST
    pool[1, 300] = 1
    after = digests.take([0, 1])
    assert after[0] == before[0] != after[1]
    assert after == take_digests(pool.cpu().numpy().astype(np.uint8), [0, 1])
