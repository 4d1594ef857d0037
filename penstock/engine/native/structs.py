"""Mirrors the structs of `api.h` and `program.cpp`, and fills them in from torch tensors.

A struct holds addresses, so each `..._struct` function also leaves the tensors behind those
addresses in an attribute of the struct: whoever holds the struct holds them. Knows no operation.
`program` and `linear` call it; `library` compares sizes with C++ when it loads.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, ClassVar, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch
    from penstock.engine.kernels import HeadsSpec, Norm

MAX_GROUPS: Final = 8
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}


class LinearStruct(Structure):
    """A packed weight."""

    keep: tuple[Tensor, Tensor | None]
    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
    ]


class NormStruct(Structure):
    """A norm; weight and bias are float32."""

    keep: tuple[Tensor | None, Tensor | None]
    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("kind", c_int32),
    ]


class AttentionStruct(Structure):
    """An attention layer and where its KV lies; strides in elements."""

    keep: tuple[Tensor, Tensor, Tensor | None]
    _fields_: ClassVar = [
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("sinks", c_void_p),
        *((f"{cache}_{step}_stride", c_int64) for cache in ("key", "value")
          for step in ("block", "slot", "head")),
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size",
                                       "group", "window", "dtype")),
        ("scale", c_float),
        ("softcap", c_float),
    ]  # fmt: skip


class HeadsStruct(Structure):
    """What happens to a QKV row."""

    keep: tuple[object, ...]
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("attention", "query_norm", "key_norm", "cos", "sin")),
        *((name, c_int32) for name in ("rotary_dim", "interleaved", "norm_weight_per_head",
                                       "norm_spans_heads", "norm_after_rotary")),
    ]  # fmt: skip


class BatchStruct(Structure):
    """A step."""

    _fields_: ClassVar = [
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("query_start", c_void_p),
        ("kv_len", c_void_p),
        ("logits_rows", c_void_p),
        ("slots", c_void_p * MAX_GROUPS),
        ("block_tables", c_void_p * MAX_GROUPS),
        ("table_strides", c_int64 * MAX_GROUPS),
        ("num_rows", c_int64),
        ("num_sequences", c_int64),
        ("num_logits_rows", c_int64),
    ]


class OperationStruct(Structure):
    """One step of a recorded decoder."""

    _fields_: ClassVar = [
        ("code", c_int32),
        ("dtype", c_int32),
        ("inputs", c_int32 * 2),
        ("outputs", c_int32 * 2),
        ("spec", c_void_p),
        ("width", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("kind", c_int32),
        ("gated", c_int32),
        ("on_selected", c_int32),
        ("reserved", c_int32),
    ]


SIZED: Final = (
    LinearStruct,
    NormStruct,
    AttentionStruct,
    HeadsStruct,
    BatchStruct,
    OperationStruct,
)
"""The structs whose sizes C++ reports, in its order."""


def linear_struct(
    packed: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shape: tuple[int, int],
) -> LinearStruct:
    """Return a packed weight `[out_features, in_features]` and its float32 bias."""
    struct = LinearStruct(
        packed.data_ptr(), _address(bias), shape[1], shape[0], DTYPES[dtype], DTYPES[out_dtype]
    )
    struct.keep = (packed, bias)
    return struct


def norm_struct(norm: Norm) -> NormStruct:
    """Return a norm whose weight and bias are copied to float32."""
    weight, bias = (
        None if part is None else part.detach().float().contiguous()
        for part in (norm.weight, norm.bias)
    )
    struct = NormStruct(_address(weight), _address(bias), norm.eps, norm.kind.value)
    struct.keep = (weight, bias)
    return struct


def attention_struct(
    spec: AttentionSpec, key_cache: Tensor, value_cache: Tensor
) -> AttentionStruct:
    """Return an attention layer over these caches; see `AttentionBackend.attend`."""
    shape = (key_cache.shape[0], key_cache.shape[1], spec.num_kv_heads, spec.head_dim)
    assert key_cache.shape == value_cache.shape == shape, (
        key_cache.shape,
        value_cache.shape,
        shape,
    )
    assert key_cache.stride(3) == value_cache.stride(3) == 1, (
        key_cache.stride(),
        value_cache.stride(),
    )
    assert key_cache.dtype == value_cache.dtype, (key_cache.dtype, value_cache.dtype)
    assert spec.num_heads % spec.num_kv_heads == 0, (spec.num_heads, spec.num_kv_heads)
    sinks = None if spec.sinks is None else spec.sinks.detach().float().contiguous()
    struct = AttentionStruct(
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        _address(sinks),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        key_cache.shape[1],
        spec.group,
        spec.window,
        DTYPES[key_cache.dtype],
        spec.scale,
        spec.softcap,
    )
    struct.keep = (key_cache, value_cache, sinks)
    return struct


def unsupported(spec: AttentionSpec, cache: Tensor) -> str | None:
    """Return why the kernels cannot run a layer, or None when they can."""
    if cache.dtype not in DTYPES:
        return f"the CPU kernels know float32 and bfloat16, not {cache.dtype}: set --dtype bfloat16"
    if not 16 <= spec.head_dim <= 256 or spec.head_dim % 16:
        return f"the CPU kernels know heads of 16 to 256 in steps of 16, not {spec.head_dim}"
    if spec.group >= MAX_GROUPS:
        return f"the CPU kernels know {MAX_GROUPS} groups of layers at most"
    return None


def heads_struct(spec: HeadsSpec, attention: AttentionStruct) -> HeadsStruct:
    """Return what happens to a QKV row."""
    norms = [
        None if norm is None else norm_struct(norm) for norm in (spec.query_norm, spec.key_norm)
    ]
    tables = (
        (None, None)
        if spec.rotary is None
        else (spec.rotary.cos.float().contiguous(), spec.rotary.sin.float().contiguous())
    )
    query_weight = None if spec.query_norm is None else spec.query_norm.weight
    struct = HeadsStruct(
        addressof(attention),
        *(None if norm is None else addressof(norm) for norm in norms),
        *(_address(table) for table in tables),
        0 if tables[0] is None else 2 * tables[0].shape[1],
        spec.rotary is not None and spec.rotary.interleaved,
        query_weight is not None and query_weight.numel() != spec.attention.head_dim,
        spec.norm_spans_heads,
        spec.norm_after_rotary,
    )
    struct.keep = (attention, norms, tables)
    return struct


def batch_struct(batch: Batch) -> BatchStruct:
    """Return a step. Its tensors are contiguous: see `Batch`."""
    groups = range(len(batch.block_tables))
    struct = BatchStruct(
        batch.token_ids.data_ptr(),
        batch.positions.data_ptr(),
        batch.query_start.data_ptr(),
        batch.kv_len.data_ptr(),
        batch.logits_rows.data_ptr(),
        num_rows=batch.token_ids.shape[0],
        num_sequences=batch.kv_len.shape[0],
        num_logits_rows=batch.logits_rows.shape[0],
    )
    for group in groups:
        table = batch.block_tables[group]
        struct.slots[group] = batch.slots[group].data_ptr()
        struct.block_tables[group] = table.data_ptr()
        struct.table_strides[group] = table.shape[1]
    return struct


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
