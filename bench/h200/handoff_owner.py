"""The process that a hand-off is pulled out of: fills a pool, describes it, and stays.

    python bench/h200/handoff_owner.py LIBRARY NUM_BLOCKS BLOCK_BYTES FRAGMENT_BYTES

Prints a line: the descriptors, of the pool by blocks and by fragments. Ends with its input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import torch

from h200.device_memory import allocate, as_fragments, make_driver
from penstock.transport.cuda_ipc import describe


def main() -> None:
    """Be the owner."""
    library, (num_blocks, block_bytes, fragment_bytes) = sys.argv[1], map(int, sys.argv[2:])
    region, blocks = allocate(library, num_blocks, block_bytes)
    # Every block its own number, in bytes that repeat it.
    blocks[:] = (torch.arange(num_blocks, device=blocks.device) % 251).to(torch.uint8)[:, None]
    if blocks.is_cuda:
        torch.cuda.synchronize()
    driver = make_driver(library)
    both = region, as_fragments(region, fragment_bytes)
    described = [describe(driver, one, os.getpid()) for one in both]
    print(msgspec.json.encode(described).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
