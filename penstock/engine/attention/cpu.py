"""Paged attention by the C++ kernels: float32 and bfloat16, heads of 16 to 256 in steps of 16.

Keeps a struct per layer and the one of the batch at hand, so that a call costs few microseconds.
What the kernels do not know goes to the reference, with a warning. `kernels/cpu.py` builds on it.
"""

from __future__ import annotations

import warnings
from ctypes import CDLL, addressof
from typing import TYPE_CHECKING, TypeGuard

from penstock.engine.attention import AttentionSpec
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.native.structs import (
    AttentionStruct,
    BatchStruct,
    attention_struct,
    batch_struct,
    unsupported,
)

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch


class CpuAttention:
    """Implements `AttentionBackend` with the compiled library."""

    name = "cpu"

    def __init__(self, library: CDLL) -> None:
        """Take the library that `load_library` returns."""
        self.notice: str | None = None
        self._library = library
        self._reference = ReferenceAttention()
        self._layers: dict[AttentionSpec, AttentionStruct] = {}
        self._stores: dict[int, AttentionStruct] = {}
        self._step: tuple[Batch, BatchStruct] | None = None

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output `[T, num_heads, head_dim]`; see `AttentionBackend.attend`."""
        if not self.is_native(spec, key_cache):
            return self._reference.attend(spec, query, key_cache, value_cache, batch)
        assert query.dtype == key_cache.dtype, (query.dtype, key_cache.dtype)
        if query.stride()[1:] != (spec.head_dim, 1):
            query = query.contiguous()
        output = query.new_empty(query.shape)
        self._library.penstock_attend(
            addressof(self.layer_struct(spec, key_cache, value_cache)),
            addressof(self.batch_struct(batch)),
            query.data_ptr(),
            query.stride(0),
            output.data_ptr(),
        )
        return output

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Write rows to their slots; see `AttentionBackend.store`."""
        _, num_heads, head_dim = key.shape
        spec = AttentionSpec(0, 0, num_heads, num_heads, head_dim, 1.0)
        if unsupported(spec, key_cache) is not None:
            self._reference.store(key, value, key_cache, value_cache, slots)
            return
        key, value = (
            rows if rows.stride()[1:] == (head_dim, 1) else rows.contiguous()
            for rows in (key.to(key_cache.dtype), value.to(key_cache.dtype))
        )
        cached = self._stores.get(id(key_cache))
        if not _is_over(cached, key_cache, value_cache):
            cached = self._stores[id(key_cache)] = attention_struct(spec, key_cache, value_cache)
        self._library.penstock_store(
            addressof(cached),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            slots.data_ptr(),
            slots.shape[0],
        )

    def is_native(self, spec: AttentionSpec, cache: Tensor) -> bool:
        """Tell whether the kernels run this layer; where not, say so once, loudly."""
        reason = unsupported(spec, cache)
        if reason is not None and self.notice is None:
            self.notice = f"attention runs on torch operations, several times slower: {reason}"
            warnings.warn(self.notice, RuntimeWarning, stacklevel=3)
        return reason is None

    def layer_struct(
        self, spec: AttentionSpec, key_cache: Tensor, value_cache: Tensor
    ) -> AttentionStruct:
        """Return the layer for C++; the same one as long as its caches are the same tensors."""
        struct = self._layers.get(spec)
        if not _is_over(struct, key_cache, value_cache):
            struct = self._layers[spec] = attention_struct(spec, key_cache, value_cache)
        return struct

    def batch_struct(self, batch: Batch) -> BatchStruct:
        """Return the batch for C++; the same one for all layers of a step."""
        if self._step is None or self._step[0] is not batch:
            self._step = batch, batch_struct(batch)
        return self._step[1]


def _is_over(
    struct: AttentionStruct | None, key_cache: Tensor, value_cache: Tensor
) -> TypeGuard[AttentionStruct]:
    """Tell whether a struct that was made earlier is about these very tensors."""
    return struct is not None and struct.keep[0] is key_cache and struct.keep[1] is value_cache
