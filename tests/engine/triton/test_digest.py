"""Digests by Triton are those that the CPU takes of the same bytes."""

import numpy as np
import pytest
import torch

from penstock.engine.triton.digest import SHORT_BYTES, digest_blocks, digest_space
from penstock.transfer.digest import take_digests


def digests_on(device, blocks, block_ids, room=0):
    there = torch.from_numpy(blocks).to(device)
    found = torch.full((len(block_ids) + room,), 7, dtype=torch.int64, device=device)
    ids = torch.tensor(block_ids, dtype=torch.int64, device=device)
    digest_blocks(there, ids, digest_space(there, len(block_ids) + room), found)
    return found.cpu().numpy().view(np.uint64).tolist()


# The smallest, one stripe and a bit, around the end of a piece, several pieces, more than are taken
# at once, the block of a real small model.
@pytest.mark.parametrize(
    "block_bytes", [248, 256, 264, 1016, 1024, 1032, 2048, 2112, 3000, 8192, 9 * 1024, 20 * 1024]
)
def test_digests_are_those_of_the_cpu(device, block_bytes):
    rng = np.random.default_rng(block_bytes)
    blocks = rng.integers(0, 256, (12, block_bytes), np.uint8)
    blocks[3], blocks[4] = 0, 255
    block_ids = [11, 3, 0, 4, 7, 7, 1, 2, 10]
    assert digests_on(device, blocks, block_ids) == list(take_digests(blocks, block_ids))


def test_every_byte_counts(device):
    block_bytes = 2 * 1024 + 72
    blocks = np.tile(np.arange(block_bytes, dtype=np.int64).astype(np.uint8), (24, 1))
    places = np.linspace(0, block_bytes - 1, len(blocks) - 1).astype(int)
    blocks[np.arange(len(places)), places] ^= 1
    assert len(set(digests_on(device, blocks, range(len(blocks))))) == len(blocks)


def test_no_more_is_written_than_was_asked_for(device):
    blocks = np.zeros((2, 1024), np.uint8)
    assert digests_on(device, blocks, [1], room=2)[1:] == [7, 7]
    assert digests_on(device, blocks, [], room=2) == [7, 7]


def test_blocks_that_xxh3_takes_for_short_are_refused(device):
    with pytest.raises(AssertionError, match=str(SHORT_BYTES)):
        digests_on(device, np.zeros((1, SHORT_BYTES), np.uint8), [0])
