"""Makes Triton's interpreter compute as a GPU does: bfloat16, and infinities without a word.

The interpreter keeps bfloat16 as 16-bit integers; as it comes, it cuts numbers off where a GPU
rounds them to nearest even, and multiplies matrices of the integers. Its float8 it does not round
either. At every launch, and at every call of a function within one, it replaces the language's
operations by its own anew: a fifth of its time. Here that is done once. The package calls `repair`
when the interpreter is on; elsewhere nothing is touched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

Numbers: TypeAlias = npt.NDArray[Any]
Kind: TypeAlias = tl.dtype
Handle: TypeAlias = tl.tensor
Argument: TypeAlias = Any
_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float32: torch.float32,
}


def repair() -> None:
    """Replace what is wrong or slow in the interpreter, and quieten numpy in launches."""
    from triton.runtime import interpreter

    launch_otherwise = interpreter.GridExecutor.__call__
    convert_otherwise = interpreter._convert_float
    dot_otherwise = interpreter.InterpreterBuilder.create_dot

    def convert(numbers: Numbers, source: Kind, target: Kind, rounding: object) -> Numbers:
        if source in _TORCH and target in _TORCH:
            return _convert(numbers, source, target)
        converted: Numbers = convert_otherwise(numbers, source, target, rounding)
        return converted

    def dot(builder: object, a: Handle, b: Handle, *rest: object) -> Handle:
        wide = (
            interpreter.TensorHandle(_convert(x.data, x.dtype.scalar, tl.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot_otherwise(builder, *wide, *rest)

    def launch(self: object, *arguments: Argument, **options: Argument) -> None:
        with np.errstate(all="ignore"):
            launch_otherwise(self, *arguments, **options)

    # The language stays replaced: this process compiles nothing.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    replaced = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda _function: replaced
    interpreter.GridExecutor.__call__ = launch
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _convert(numbers: Numbers, source: Kind, target: Kind) -> Numbers:
    """Return numbers of another type, rounded to nearest even, as the interpreter keeps them."""
    given = torch.from_numpy(np.ascontiguousarray(numbers)).view(_TORCH[source])
    result = given.to(_TORCH[target])
    if target == tl.float8e4nv:
        # Hopper saturates; torch makes what is too large no number.
        result = given.float().clamp(-448, 448).to(_TORCH[target])
    whole = {1: torch.uint8, 2: torch.uint16, 4: torch.float32}[result.element_size()]
    return result.view(whole).numpy()
