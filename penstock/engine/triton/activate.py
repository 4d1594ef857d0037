"""An MLP's activation, with or without a gate, in one pass.

Computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from penstock.engine.kernels import Activation
from penstock.engine.triton.arguments import Pointer, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

_SILU = tl.constexpr(Activation.SILU.value)
_GELU = tl.constexpr(Activation.GELU.value)
_GELU_TANH = tl.constexpr(Activation.GELU_TANH.value)
_RELU = tl.constexpr(Activation.RELU.value)
_COLUMNS: Final = 1024


def activate(x: Tensor, activation: Activation, output: Tensor, *, gated: bool) -> None:
    """Write `f(x)`, or when gated `f(x[:, :n]) * x[:, n:]`, to `output`, `[T, n]`.

    `x` is `[T, n]`, or `[T, 2 n]` when gated. Rows are contiguous.
    """
    num_rows, width = output.shape
    assert x.shape == (num_rows, width * (2 if gated else 1)), (x.shape, output.shape)
    assert x.stride(1) == output.stride(1) == 1, (x.stride(), output.stride())
    _activate[num_rows, triton.cdiv(width, _COLUMNS)](
        x, output, width, x.stride(0), output.stride(0), KIND=activation.value, IS_GATED=gated,
        COLUMNS=_COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _activate(
    x: Pointer, output: Pointer, width: Size, x_row: Size, output_row: Size,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    value = tl.load(x + row * x_row + column, mask=is_column, other=0.0).to(tl.float32)
    value = _bent(value, KIND)
    if IS_GATED:
        up = tl.load(x + row * x_row + width + column, mask=is_column, other=0.0)
        value = value * up.to(tl.float32)
    to = output + row * output_row + column
    tl.store(to, value.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def _bent(value: Tile, KIND: tl.constexpr) -> Tile:
    """Return the activation of float32 numbers."""
    if KIND == _SILU:
        result = value / (1.0 + tl.exp(-value))
    elif KIND == _GELU:
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif KIND == _GELU_TANH:
        # 0.5 (1 + tanh y) is the logistic function of 2 y.
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        result = value / (1.0 + tl.exp(-inner))
    else:
        result = tl.maximum(value, 0.0)
        if KIND != _RELU:
            result = result * result
    return result
