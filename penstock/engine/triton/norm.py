"""The residual sum and the norm that follows it, in one pass over a row.

A program has a row. Sums are taken in float32 and rounded where the reference rounds, so that the
residual stream is the same to the bit as long as sums are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from penstock.engine.kernels import Norm, NormKind
from penstock.engine.triton.arguments import Pointer, Scalar, Size

if TYPE_CHECKING:
    from torch import Tensor

_RMS_LLAMA = tl.constexpr(NormKind.RMS_LLAMA.value)
_LAYER = tl.constexpr(NormKind.LAYER.value)


def norm_rows(x: Tensor, norm: Norm, normed: Tensor) -> None:
    """Write the norm of every row of `x`, `[T, width]`, to `normed`. Rows are contiguous."""
    _launch(x, None, 1.0, norm, None, normed)


def add_norm(
    residual: Tensor, delta: Tensor, scale: float, norm: Norm, *, total: Tensor, normed: Tensor
) -> None:
    """Write `residual + scale * delta` to `total`, rounded, and the norm of that to `normed`.

    All are `[T, width]` of one dtype with contiguous rows; `total` may be `residual`. Weight and
    bias of the norm are float32 or of that dtype.
    """
    _launch(residual, delta, scale, norm, total, normed)


def _launch(
    x: Tensor, delta: Tensor | None, scale: float, norm: Norm, total: Tensor | None, normed: Tensor
) -> None:
    num_rows, width = x.shape
    for rows in (x, delta, total, normed):
        assert rows is None or (rows.shape == x.shape and rows.stride(1) == 1), (x.shape, rows)
    padded = triton.next_power_of_2(width)
    _add_norm[(num_rows,)](
        x, x if delta is None else delta, x if total is None else total, normed,
        x if norm.weight is None else norm.weight, x if norm.bias is None else norm.bias,
        scale, norm.eps, x.stride(0), x.stride(0) if delta is None else delta.stride(0),
        x.stride(0) if total is None else total.stride(0), normed.stride(0),
        WIDTH=width, PADDED_WIDTH=padded, KIND=norm.kind.value, HAS_DELTA=delta is not None,
        HAS_WEIGHT=norm.weight is not None, HAS_BIAS=norm.bias is not None,
        num_warps=min(8, max(1, padded // 512)), enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _add_norm(
    x: Pointer, delta: Pointer, total: Pointer, normed: Pointer, weight: Pointer, bias: Pointer,
    scale: Scalar, eps: Scalar, x_row: Size, delta_row: Size, total_row: Size, normed_row: Size,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, KIND: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_WIDTH)
    is_column = column < WIDTH
    value = tl.load(x + row * x_row + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        change = tl.load(delta + row * delta_row + column, mask=is_column, other=0.0)
        rounded = (value + scale * change.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * total_row + column, rounded, mask=is_column)
        value = rounded.to(tl.float32)
    if KIND == _LAYER:
        value = tl.where(is_column, value - tl.sum(value, 0) / WIDTH, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    if KIND == _RMS_LLAMA:
        value = value.to(normed.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        value = value * tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value = value + tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    to = normed + row * normed_row + column
    tl.store(to, value.to(normed.dtype.element_ty), mask=is_column)
