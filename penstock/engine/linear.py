"""Linear layers of a frozen model, with weights laid out for the machine.

A `Linear` is made once, in the host process, and its packed weight is shared by the workers that
are forked from it; the plain weight is not kept beside it. `Packing` says how, `choose_packing`
when. Does not know what is multiplied. `lift` makes them, `Kernels` and forwards call them.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from ctypes import addressof
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import torch
from torch.nn import functional

from penstock.engine.native.library import load_library
from penstock.engine.native.structs import DTYPES, LinearStruct, linear_struct

if TYPE_CHECKING:
    from torch import Tensor


_MATRIX_SIZE_MIN: Final = 1 << 20
"""Elements of a weight below which the cost of a call outweighs matrix instructions."""


class Packing(Enum):
    """Layout of a weight.

    NATIVE  panels for our own kernel: as fast as oneDNN for many rows, faster for few, no overhead
    ONEDNN  oneDNN's choice, by torch operations that are private
    PLAIN   as it came
    """

    NATIVE = "native"
    ONEDNN = "onednn"
    PLAIN = "plain"


class Linear:
    """A product with a constant weight, `x @ weight.T + bias`.

    `struct` is what the native kernels work by, None unless the packing is NATIVE.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        packing: Packing | None = None,
    ) -> None:
        """Take a weight `[out_features, in_features]` and a bias `[out_features]`.

        `out_dtype` is the weight's unless given; float32 keeps a head's logits unrounded.
        """
        self.out_features, self.in_features = weight.shape
        self.dtype, self.out_dtype = weight.dtype, out_dtype or weight.dtype
        self.packing = packing or choose_packing(weight)
        self.struct: LinearStruct | None = None
        self._multiply: Callable[[Tensor], Tensor]
        match self.packing:
            case Packing.NATIVE:
                self._weight, self._multiply = self._pack_native(weight, bias)
            case Packing.ONEDNN:
                self._weight, self._multiply = _pack_onednn(weight, bias)
            case Packing.PLAIN:
                self._weight = weight
                self._multiply = lambda x: functional.linear(x, weight, bias)

    @classmethod
    def stacked(cls, *parts: tuple[Tensor, Tensor | None]) -> Self:
        """Return one product for several weights over the same input, its outputs side by side."""
        weights = [weight for weight, _ in parts]
        biases = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in parts
        ]
        has_bias = any(bias is not None for _, bias in parts)
        return cls(torch.cat(weights), torch.cat(biases) if has_bias else None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` in `out_dtype`."""
        return self._multiply(x).to(self.out_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows `[len(ids), in_features]` of the weight: the embedding of a tied head."""
        if self.struct is None:
            return functional.embedding(ids, self.table)
        result = torch.empty(len(ids), self.in_features, dtype=self.dtype)
        library = load_library().library
        assert library is not None
        library.penstock_rows(addressof(self.struct), ids.data_ptr(), len(ids), result.data_ptr())
        return result

    @cached_property
    def table(self) -> Tensor:
        """The plain weight; a copy, made once, where it is packed."""
        if self.packing is Packing.NATIVE:
            return self.rows(torch.arange(self.out_features))
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def _pack_native(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Pack for our own kernel; see `native/linear.cpp`."""
        library = load_library().library
        assert library is not None
        assert self.out_dtype in (self.dtype, torch.float32), (self.dtype, self.out_dtype)
        kind, shape = DTYPES[self.dtype], (self.out_features, self.in_features)
        plain = weight.detach().contiguous()
        packed = torch.empty(library.penstock_packed_words(*shape, kind), dtype=torch.int32)
        library.penstock_pack(plain.data_ptr(), *shape, kind, packed.data_ptr())
        wide = None if bias is None else bias.detach().float().contiguous()
        struct = linear_struct(packed, wide, self.dtype, self.out_dtype, shape)
        self.struct = struct

        def multiply(x: Tensor) -> Tensor:
            assert (x.dtype, x.shape[-1]) == (self.dtype, self.in_features), (x.dtype, x.shape)
            x = x.contiguous()
            result = torch.empty(*x.shape[:-1], self.out_features, dtype=self.out_dtype)
            rows = x.numel() // self.in_features
            library.penstock_linear(addressof(struct), x.data_ptr(), rows, result.data_ptr())
            return result

        return packed, multiply


def choose_packing(weight: Tensor) -> Packing:
    """Return the fastest layout for a weight.

    Our own kernel reaches what oneDNN does at many rows and is 1.4 to 2.7 times faster up to eight,
    on a CPU that multiplies bfloat16 in vectors or not at all. Where a CPU has matrix instructions
    (AMX), which it does not use, oneDNN takes the weights that are large enough to gain by them.
    """
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return Packing.PLAIN
    is_half = weight.dtype is torch.bfloat16
    prefers_onednn = is_half and (
        weight.shape[1] % 2 or (_has_matrix_instructions() and weight.numel() >= _MATRIX_SIZE_MIN)
    )
    if load_library().library is not None and not prefers_onednn:
        return Packing.NATIVE
    return Packing.ONEDNN if can_use_onednn(weight.dtype) else Packing.PLAIN


def can_use_onednn(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN packs weights of that type here: bfloat16 wants AVX-512 or the like."""
    if not _has_onednn():
        return False
    is_half = dtype is torch.bfloat16
    return not is_half or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_matrix_instructions() -> bool:
    if platform.machine() in {"aarch64", "arm64"}:
        return True
    return "amx_bf16" in _cpu_flags()


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


@cache
def _has_onednn() -> bool:
    """Tell whether torch has the private operations that we pack with; where not, say so once."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    is_built = torch._C._has_mkldnn
    if is_built and all(hasattr(torch.ops.mkldnn, name) for name in names):
        return True
    warnings.warn(
        f"torch {torch.__version__} cannot pack weights: decoding is about half as fast as it "
        "could be; install a C++ compiler or torch 2.11 to 2.13",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def multiply(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result

    return packed, multiply
