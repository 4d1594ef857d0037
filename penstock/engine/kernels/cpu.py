"""The decoder's operations by the C++ kernels.

`CpuKernels` runs attention natively wherever it is called from. The other operations are native in
a prepared forward: `Recorder` takes part in one run of it, writes down every call as an
`Operation`, and a `Program` then runs them all in one native call. `select_kernels` makes a
`CpuKernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from typing import TYPE_CHECKING, Any

import torch

from penstock.engine.attention.cpu import CpuAttention
from penstock.engine.kernels import Activation, HeadsSpec, Kernels, Norm
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.linear import Linear
from penstock.engine.native.program import Code, Operation, Program, Value
from penstock.engine.native.structs import NormStruct, heads_struct, norm_struct

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch


class CpuKernels(ReferenceKernels):
    """Implements `Kernels` with the compiled library; single operations but attention by torch."""

    name = "cpu"

    def __init__(self, library: CDLL) -> None:
        """Take the library that `load_library` returns."""
        super().__init__()
        self._library = library
        self._attention = CpuAttention(library)

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output of every query row; see `AttentionBackend.attend`."""
        output = self._attention.attend(spec, query, key_cache, value_cache, batch)
        self.notice = self._attention.notice
        return output

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Write rows to their slots; see `AttentionBackend.store`."""
        self._attention.store(key, value, key_cache, value_cache, slots)

    def prepare(self, forward: Callable[[Kernels, Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Return the forward as a program; as it is, loudly, where a layer is not native."""
        recorder: Any = Recorder(self._attention)
        try:
            # A forward hands the batch on unopened, so it can be recorded before there is one.
            result: Any = forward(recorder, None)  # type: ignore[arg-type]
        except NotNativeError:
            self.notice = self._attention.notice
            return super().prepare(forward)
        return Program(self._library, recorder.operations, result)


class NotNativeError(Exception):
    """The kernels do not know a layer of the model; `CpuAttention.notice` says which and why."""


class Recorder:
    """Takes the place of `Kernels` in a forward, and of every tensor a `Value`."""

    name = "recorder"

    def __init__(self, attention: CpuAttention) -> None:
        """Take the attention whose layers the recording refers to."""
        self.operations: list[Operation] = []
        self._attention = attention
        self._norms: dict[Norm, NormStruct] = {}
        self._num_values = 0

    def embed(self, table: Tensor | Linear, batch: Batch, scale: float = 1.0) -> Value:
        """Record the look-up of the batch's tokens."""
        if isinstance(table, Linear) and table.struct is not None:
            output = self._value(table.in_features, table.dtype)
            return self._record(Code.EMBED_PACKED, (), output, spec=table.struct, scale=scale)
        plain = table.table if isinstance(table, Linear) else table.contiguous()
        output = self._value(plain.shape[1], plain.dtype)
        return self._record(Code.EMBED, (), output, spec=plain, scale=scale)

    def norm(self, x: Value, norm: Norm) -> Value:
        """Record the norm of every row."""
        return self._record(Code.NORM, (x,), self._like(x), spec=self._norm(norm))

    def add(self, residual: Value, delta: Value, scale: float = 1.0) -> Value:
        """Record `residual + scale * delta`."""
        return self._record(Code.ADD, (residual, delta), self._like(residual), scale=scale)

    def add_norm(
        self, residual: Value, delta: Value, norm: Norm, scale: float = 1.0
    ) -> tuple[Value, Value]:
        """Record the sum and its norm."""
        outputs = self._like(residual), self._like(residual)
        spec = self._norm(norm)
        self._record(Code.ADD_NORM, (residual, delta), *outputs, spec=spec, scale=scale)
        return outputs

    def linear(self, linear: Linear, x: Value) -> Value:
        """Record a product, native or not."""
        assert x.width == linear.in_features, (x.width, linear.in_features)
        output = self._like(x, linear.out_features, linear.out_dtype)
        if linear.struct is None:
            return self._record(Code.APPLY, (x,), output, function=linear)
        return self._record(Code.LINEAR, (x,), output, spec=linear.struct)

    def heads(
        self, spec: HeadsSpec, qkv: Value, key_cache: Tensor, value_cache: Tensor, batch: Batch
    ) -> Value:
        """Record what happens to a QKV row before attention."""
        shape = spec.attention
        if not self._attention.is_native(shape, key_cache):
            raise NotNativeError
        assert qkv.width == (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, qkv
        layer = self._attention.layer_struct(shape, key_cache, value_cache)
        output = self._like(qkv, shape.num_heads * shape.head_dim)
        return self._record(Code.HEADS, (qkv,), output, spec=heads_struct(spec, layer))

    def attend(
        self,
        spec: AttentionSpec,
        query: Value,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Value:
        """Record attention."""
        if not self._attention.is_native(spec, key_cache):
            raise NotNativeError
        layer = self._attention.layer_struct(spec, key_cache, value_cache)
        return self._record(Code.ATTEND, (query,), self._like(query), spec=layer)

    def activate(self, x: Value, activation: Activation, *, gated: bool) -> Value:
        """Record an activation."""
        output = self._like(x, x.width // 2 if gated else x.width)
        return self._record(Code.ACTIVATE, (x,), output, kind=activation.value, gated=gated)

    def select_rows(self, x: Value, batch: Batch) -> Value:
        """Record that only the rows that need logits go on."""
        output = self._value(x.width, x.dtype, on_selected=True)
        return self._record(Code.SELECT_ROWS, (x,), output)

    def cap(self, x: Value, scale: float, softcap: float) -> Value:
        """Record the last bend of the logits."""
        if x.dtype is torch.float32 and scale == 1.0 and softcap == 0.0:
            return x
        output = self._like(x, dtype=torch.float32)
        return self._record(Code.CAP, (x,), output, scale=scale, softcap=softcap)

    def apply(self, function: Callable[[Tensor], Tensor], x: Value) -> Value:
        """Record a call of torch code; it breaks the native call in two."""
        return self._record(Code.APPLY, (x,), self._like(x), function=function)

    def _record(
        self, code: Code, inputs: tuple[Value, ...], *outputs: Value, **fields: object
    ) -> Value:
        self.operations.append(Operation(code, inputs, outputs, **fields))  # type: ignore[arg-type]
        return outputs[0]

    def _like(self, x: Value, width: int | None = None, dtype: torch.dtype | None = None) -> Value:
        return self._value(width or x.width, dtype or x.dtype, on_selected=x.on_selected)

    def _value(self, width: int, dtype: torch.dtype, *, on_selected: bool = False) -> Value:
        self._num_values += 1
        return Value(self._num_values, width, dtype, on_selected)

    def _norm(self, norm: Norm) -> NormStruct:
        return self._norms.setdefault(norm, norm_struct(norm))
