"""Which slots of a long context to keep: StreamingLLM's window, and SnapKV at the end of prefill.

Pure functions from lengths and attention statistics to slot numbers. They know no block and no
pool; the prefill worker would gather what they keep into fresh blocks before it offers them. Opt-in
and lossy: KV that was selected is no function of its tokens any more, so it must never be named in
a prefix cache. Slots are those of full-attention layers; a sliding window selects for itself.
Rotary positions stay what they were: after a selection a sequence's `kv_len` is smaller than its
next position.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


def streaming_slots(num_tokens: int, *, num_sinks: int, window: int) -> Slots:
    """Return the slots of the first tokens, on which attention rests, and of the latest, ascending.

    Source: Xiao et al., Efficient streaming language models with attention sinks, arXiv 2309.17453.
    """
    _require(num_sinks >= 0 and window > 0, f"{num_sinks} sinks and a window of {window}")
    first_recent = max(num_tokens - window, min(num_sinks, num_tokens))
    return np.concatenate(
        [np.arange(min(num_sinks, num_tokens)), np.arange(first_recent, num_tokens)]
    )


def streaming_blocks(
    num_blocks: int, *, block_size: int, num_sinks: int, window: int
) -> tuple[range, range]:
    """Return the blocks at the front and at the end that a window keeps whole.

    Dropping blocks from a table needs no copy: every slot that `streaming_slots` keeps is in one of
    these, beside some that it would not. The ranges do not overlap.
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


def snap_slots(scores: Scores, num_tokens: int, *, capacity: int) -> Slots:
    """Return the slots that each KV head keeps, [num_kv_heads, capacity], ascending.

    `scores` is what `snap_scores` returns; the slots behind it, of the queries that voted, are all
    kept. Of equal scores the earliest wins, so that every process selects the same. Heads keep
    different tokens, but equally many: they share slots in the gathered blocks. A prompt that fits
    is kept whole, `capacity` or fewer slots. O(num_tokens log num_tokens) per head.
    """
    num_kv_heads, num_past = scores.shape
    num_recent = num_tokens - num_past
    _require(0 <= num_recent < capacity, f"{num_recent} recent slots in a capacity of {capacity}")
    num_kept = min(capacity - num_recent, num_past)
    # A stable sort of what is negated: largest first, earliest first among equals.
    best = np.argsort(-scores, axis=1, kind="stable")[:, :num_kept]
    recent = np.broadcast_to(np.arange(num_past, num_tokens), (num_kv_heads, num_recent))
    return np.concatenate([np.sort(best, axis=1), recent], axis=1).astype(np.int64)


def runs_of(slots: Slots) -> list[range]:
    """Return ascending slots as runs of neighbours, which are what a gather copies."""
    if not len(slots):
        return []
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    ends = [0, *breaks.tolist(), len(slots)]
    return [range(int(slots[a]), int(slots[b - 1]) + 1) for a, b in pairwise(ends)]


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"no selection: {what}")
