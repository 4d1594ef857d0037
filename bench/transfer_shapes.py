"""What is moved in `transfer.py`: shapes, contents and permutations, the same in every process.

Knows numpy and nothing of Penstock: the peers' processes import it too.
"""

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

KIB = 1024
MIB = 1024 * KIB
MOVED_BYTES = 64 * MIB


@dataclass(frozen=True)
class Shape:
    """`count` pieces of `block_bytes`, out of pools of twice as many."""

    name: str
    block_bytes: int

    @property
    def count(self) -> int:
        """Pieces that one transfer moves."""
        return MOVED_BYTES // self.block_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks of either pool."""
        return 2 * self.count

    @property
    def blocks(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Blocks of the source, and where each goes: random on both sides."""
        rng = np.random.default_rng(self.block_bytes)
        source, destination = (rng.permutation(self.num_blocks)[: self.count] for _ in range(2))
        return source.astype(np.int64), destination.astype(np.int64)

    def fill(self, pool: npt.NDArray[np.uint8]) -> None:
        """Write contents of which no two words are equal."""
        words = np.arange(pool.nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        pool.reshape(-1).view(np.uint64)[:] = words

    def is_right(self, pool: npt.NDArray[np.uint8]) -> bool:
        """Tell whether every byte that was to be moved is in its place."""
        expected = empty_pool(self)
        self.fill(expected)
        source, destination = self.blocks
        step = max(1, (4 * MIB) // self.block_bytes)
        return all(
            np.array_equal(pool[destination[i : i + step]], expected[source[i : i + step]])
            for i in range(0, self.count, step)
        )


SHAPES = (
    Shape("1x64MiB", 64 * MIB),
    Shape("1024x64KiB", 64 * KIB),
    Shape("16384x4KiB", 4 * KIB),
)
SINGLES = {"4KiB": 2, "64KiB": 1}
"""Latency of one block: of which shape."""
SINGLES_COUNT = 200
"""One after the other, each another block: none is in a cache because it was just moved."""


def empty_pool(shape: Shape) -> npt.NDArray[np.uint8]:
    """Return private memory whose pages are taken."""
    memory = mmap.mmap(-1, 2 * MOVED_BYTES)
    pool = np.frombuffer(memory, np.uint8).reshape(shape.num_blocks, shape.block_bytes)
    pool[:] = 0
    return pool
