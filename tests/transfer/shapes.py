"""KV content told by token and head, pools that hold it in any shape, and what must come out.

The plain way: one slot after the other, with none of the arithmetic that is tested. Used by the
tests of reshaping here and in `tests/transport/`.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from penstock.core.block import KVGroup, KVLayout
from penstock.core.messages import GroupBlocks
from penstock.core.types import BlockId
from penstock.transfer.digest import take_digests

GROUPS = (KVGroup((0, 2)), KVGroup((1,), window=40))
WHOLE = KVLayout("m", GROUPS, 4, 4, 16, "float32", total_kv_heads=4)
NUM_BLOCKS = 24
UNTOUCHED = 0xA5
TYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}

Content = npt.NDArray[np.float32]
"""[num_tokens, layers, 2, heads, head_dim]; exact in every dtype."""


def shard(degree: int, rank: int, block_size: int, dtype: str) -> KVLayout:
    """Return the layout of one worker of a tensor-parallel group."""
    heads = 4 // degree
    return replace(
        WHOLE,
        block_size=block_size,
        dtype=dtype,
        num_kv_heads=heads,
        first_kv_head=rank * heads,
    )


def content_of(num_tokens: int, group: int = 0, seed: int = 0) -> Content:
    """Draw KV that every dtype can hold: whole numbers up to 256."""
    rng = np.random.default_rng((seed, group))
    shape = (num_tokens, len(GROUPS[group].layers), 2, 4, WHOLE.head_dim)
    return rng.integers(-256, 257, shape).astype(np.float32)


def table(rng: np.random.Generator, layout: KVLayout, begin: int, end: int) -> GroupBlocks:
    """Draw blocks that hold tokens [begin, end), and now and then a block more on either side."""
    size = layout.block_size
    first = max(0, begin // size - int(rng.integers(2)))
    count = -(-end // size) - first + int(rng.integers(2))
    ids = rng.permutation(NUM_BLOCKS)[:count].tolist()
    return GroupBlocks(first, tuple(map(BlockId, ids)))


def empty_pool(layout: KVLayout, group: int = 0) -> npt.NDArray[np.uint8]:
    """Return a pool that nobody has written to."""
    return np.full((NUM_BLOCKS, layout.block_bytes[group]), UNTOUCHED, np.uint8)


def write(
    pool: npt.NDArray[np.uint8],
    layout: KVLayout,
    blocks: GroupBlocks,
    content: Content,
    tokens: Iterable[int],
) -> None:
    """Put tokens where `layout` and `blocks` say, one at a time."""
    num_layers = content.shape[1]
    size, heads = layout.block_size, layout.kv_heads
    for token in tokens:
        block = pool[blocks.block_ids[token // size - blocks.first]]
        values = block.view(TYPES[layout.dtype]).reshape(num_layers, 2, size, len(heads), -1)
        exact = content[token][:, :, heads.start : heads.stop]
        if layout.dtype == "bfloat16":  # whole numbers up to 256 lose nothing by this
            values[:, :, token % size] = exact.view(np.uint32) >> 16
        else:
            values[:, :, token % size] = exact


def with_digests(pool: npt.NDArray[np.uint8], blocks: GroupBlocks) -> GroupBlocks:
    """Return what an owner would offer."""
    return GroupBlocks(blocks.first, blocks.block_ids, take_digests(pool, blocks.block_ids))
