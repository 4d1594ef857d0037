"""Puts together what several programs have found in their shares of a sequence's slots.

The second half of `paged_attention` where it divides slots. Knows nothing but parts and weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Size

if TYPE_CHECKING:
    from torch import Tensor


def merge_splits(partial: Tensor, lse: Tensor, output: Tensor, query_start: Tensor) -> None:
    """Write the mean of the parts, weighted by their softmax sums, to the rows of the sequences.

    `partial` is `[splits, N, num_heads, head_dim]` float32 and `lse` `[splits, N, num_heads]`
    float32, both contiguous, splits a power of two; what belongs to an `lse` of minus infinity is
    not read. Their row i goes to row `query_start[0] + i` of `output`, `[T, num_heads, head_dim]`,
    as far as `query_start[-1]`. A row without any part becomes 0.
    """
    num_splits, num_rows, num_heads, head_dim = partial.shape
    assert partial.is_contiguous(), partial.stride()
    assert lse.is_contiguous(), lse.stride()
    _merge[num_rows, num_heads](
        partial, lse, output, query_start, len(query_start) - 1, num_rows, num_heads,
        *output.stride()[:2], HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        SPLITS=num_splits, enable_fp_fusion=True,
        num_warps=1 if head_dim * num_splits <= 2048 else 4,
    )  # fmt: skip


@triton.jit
def _merge(
    partial: Pointer, lse: Pointer, output: Pointer, query_start: Pointer,
    num_sequences: Size, num_rows: Size, num_heads: Size, output_row: Size, output_head: Size,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = row + tl.load(query_start)
    if target >= tl.load(query_start + num_sequences):
        return
    split, dim = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, PADDED_DIM)
    places = (split * num_rows + row) * num_heads + head
    found = tl.load(lse + places)
    largest = tl.max(found, 0)
    weights = tl.exp2(found - tl.where(largest == float("-inf"), 0.0, largest))
    is_part = (weights > 0.0)[:, None] & (dim < HEAD_DIM)[None, :]
    parts = tl.load(partial + places[:, None] * HEAD_DIM + dim[None, :], mask=is_part, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    to = output + target * output_row + head * output_head + dim
    tl.store(to, result.to(output.dtype.element_ty), mask=dim < HEAD_DIM)
