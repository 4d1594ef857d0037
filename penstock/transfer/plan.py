"""From block ids on both sides to the fewest copies: bidirectional alignment.

Knows ids and sizes, neither memory nor peers. The worker core makes the spans of a `Move` with it,
and the block mover turns them into offsets.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.core.events import Span
from penstock.core.types import BlockId


def align(source_ids: Sequence[BlockId], destination_ids: Sequence[BlockId]) -> list[Span]:
    """Cut a list of block copies where either side stops being adjacent; one span is one copy.

    `source_ids[i]` goes to `destination_ids[i]`. R spans for r and s runs on the two sides: R <= r
    + s - 1. O(n) in numpy, then O(R). Source: FlowKV (arXiv 2504.03775), bidirectional segment
    alignment.
    """
    count = len(source_ids)
    assert count == len(destination_ids), (count, len(destination_ids))
    if not count:
        return []
    ids = np.stack([_as_array(source_ids), _as_array(destination_ids)])
    is_cut = (np.diff(ids) != 1).any(axis=0)
    starts = np.concatenate(([0], np.flatnonzero(is_cut) + 1))
    lengths = np.diff(starts, append=count)
    return list(map(Span, *ids[:, starts].tolist(), lengths.tolist()))


def num_blocks(spans: Sequence[Span]) -> int:
    """Return how many blocks the spans copy."""
    return sum(span.num_blocks for span in spans)


def byte_ranges(spans: Sequence[Span], block_bytes: int) -> list[tuple[int, int, int]]:
    """Return (source offset, destination offset, length) of each span, in bytes."""
    return [
        (s.source * block_bytes, s.destination * block_bytes, s.num_blocks * block_bytes)
        for s in spans
    ]


def _as_array(block_ids: Sequence[BlockId]) -> npt.NDArray[np.int64]:
    return np.fromiter(block_ids, np.int64, len(block_ids))
