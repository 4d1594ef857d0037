"""Which blocks of a long context to keep: StreamingLLM's window, and SnapKV at the end of prefill.

Pure functions from lengths and attention statistics to entries of a block table. They know no block
and no pool: `kv/cache.py` lets go of what they leave out, `engine/observe.py` measures attention.
Opt-in and lossy: what is computed after a selection is no function of its tokens alone any more, so
it is never named as if it were. For models without sliding windows, which select for themselves.
Rotary positions stay what they were: after a selection a sequence's `kv_len` is smaller than its
next position.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
OBSERVED_TOKENS: Final = 16
"""So many last tokens of a prompt vote on which of its blocks are kept."""


def streaming_blocks(
    num_blocks: int, *, block_size: int, num_sinks: int, window: int
) -> tuple[range, range]:
    """Return the blocks at the front and at the end that a window keeps whole.

    Letting go of blocks needs no copy; the window is kept with what else is in its first block.
    The ranges do not overlap.
    Source: Xiao et al., Efficient streaming language models with attention sinks, arXiv 2309.17453.
    """
    _require(num_sinks >= 0 and window > 0, f"{num_sinks} sinks and a window of {window}")
    front = min(-(-num_sinks // block_size), num_blocks)
    # The last block may hold a single token, so the window reaches one block further back.
    recent = min(-(-(window - 1) // block_size) + 1, num_blocks - front)
    return range(front), range(num_blocks - recent, num_blocks)


def snap_scores(
    weights: npt.NDArray[np.floating], num_kv_heads: int, *, kernel_size: int = 7
) -> Scores:
    """Return how much the last queries of a prompt look at each slot before them.

    `weights` is [num_heads, num_queries, num_tokens], the softmax over all `num_tokens` slots of
    which the queries are the last; heads that share a KV head come one after another. The result is
    [num_kv_heads, num_tokens - num_queries]: the mean over queries and heads, then the largest
    within `kernel_size` neighbours, so that what surrounds an important token stays with it.
    O(num_heads * num_queries * num_tokens).
    Source: Li et al., SnapKV: LLM knows what you are looking for before generation, arXiv
    2404.14469.
    """
    num_heads, num_queries, num_tokens = weights.shape
    _require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} KV heads")
    _require(kernel_size % 2 == 1, f"a kernel of {kernel_size}: it must be odd")
    past = weights[:, :, : num_tokens - num_queries].astype(np.float32)
    by_head = past.reshape(num_kv_heads, -1, past.shape[2])
    votes = by_head.mean(axis=1, dtype=np.float32)
    reach = kernel_size // 2
    padded = np.pad(votes, ((0, 0), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel_size, axis=1)
    pooled: Scores = windows.max(axis=2)
    return pooled


def snap_blocks(
    scores: Sequence[float], num_tokens: int, *, block_size: int, capacity_tokens: int
) -> tuple[range, ...]:
    """Return the blocks to let go of after `num_tokens` tokens, as ranges of entries, ascending.

    `scores[i]` says how much the last `OBSERVED_TOKENS` look at block i. The first block, on which
    attention rests, and those that hold the tokens that voted stay whatever they got; of the
    others those with the best scores, until the blocks together hold `capacity_tokens`. Of equal
    scores the earliest wins, so that every worker selects the same. O(blocks * log blocks).

    Whole blocks, the same for every layer and head: a block is one span over all of them
    (`core/block.py`), so letting go of it needs no copy and leaves nothing half empty. What is
    chosen token by token and head by head would have to be gathered into blocks of its own.
    """
    first_recent = max(1, (num_tokens - OBSERVED_TOKENS) // block_size)
    num_blocks = -(-num_tokens // block_size)
    num_kept = -(-capacity_tokens // block_size) - 1 - (num_blocks - first_recent)
    ranked = sorted(range(1, first_recent), key=lambda entry: -scores[entry])
    let_go = sorted(ranked[max(0, num_kept) :])
    starts = [i for i, entry in enumerate(let_go) if not i or entry != let_go[i - 1] + 1]
    ends = [*starts[1:], len(let_go)]
    return tuple(range(let_go[a], let_go[b - 1] + 1) for a, b in zip(starts, ends, strict=False))


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"no selection: {what}")
