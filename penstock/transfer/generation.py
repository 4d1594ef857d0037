"""Generations: what makes it visible that a block was handed out anew while a peer still read it.

A worker counts in memory that its peers can read how often each block was handed out, before
anything is written there. An offer carries the numbers; who has copied a block looks at its number
afterwards: if it is the one of the offer, no byte of the copy is from a later use of the block. The
counters of KV group g are the region after those of the pools, number `num_groups + g`, with blocks
of 8 bytes: what reads blocks reads counters.

Pure; the movers of `transport` and `sim` call it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.transfer.plan import SpanArray
from penstock.transfer.region import Bytes2D

COUNTER_BYTES: Final = 8


def counters(blocks: Bytes2D) -> npt.NDArray[np.int64]:
    """View a region of counters, [num_blocks, 8] uint8, as [num_blocks] int64."""
    return blocks.view(np.int64)[:, 0]


def counter_spans(spans: SpanArray) -> SpanArray:
    """Return the spans that copy the counters of the source blocks one behind the other."""
    packed = spans.copy()
    packed[:, 1] = np.cumsum(spans[:, 2]) - spans[:, 2]
    return packed


def is_stale(found: npt.NDArray[np.int64], offered: Sequence[int]) -> bool:
    """Tell whether a counter is not what it was when its block was offered.

    An offer without generations cannot be stale.
    """
    return bool(offered) and not np.array_equal(found, np.asarray(offered, np.int64))
