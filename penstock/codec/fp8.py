"""fp8: a float8 (e4m3) a number, and a scale for each token and head that takes its largest to 448.

A plane is scale `[block_size, heads]` in float16, then codes `[block_size, width]`. The native twin
is `native/fp8.cpp`.

Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from penstock.codec.method import BlockShape, Bytes, Floats, Method

_LARGEST: Final = np.float32(448)
_SMALLEST_NORMAL: Final = np.float32(1 / 64)
# The distance of neighbours from 2^14 on is that of the numbers below the smallest normal one.
_SUBNORMAL_MAGIC: Final = np.float32(16384)
_EXPONENT_SHIFT: Final = 120
"""Of float's bias to that of e4m3."""


def _encoded_bytes(shape: BlockShape) -> int:
    return shape.num_elements + 2 * shape.num_elements // shape.head_dim


def _encode(shape: BlockShape, block: Bytes) -> Bytes:
    heads = shape.floats(block).reshape(shape.num_planes, -1, shape.head_dim)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        largest = np.abs(heads).max(2, keepdims=True) / _LARGEST
        scale = np.minimum(largest, np.float32(65504)).astype(np.float16)
        exact = scale.astype(np.float32)
        inverse = np.where(exact > 0, np.float32(1) / exact, np.float32(0))
        codes = _to_e4m3(heads * inverse)
    parts = [scale.view(np.uint8).reshape(shape.num_planes, -1), codes]
    return np.concatenate([part.reshape(shape.num_planes, -1) for part in parts], 1).reshape(-1)


def _decode(shape: BlockShape, encoded: Bytes) -> Bytes:
    planes = encoded[: _encoded_bytes(shape)].reshape(shape.num_planes, -1)
    num_heads = shape.block_size * shape.width // shape.head_dim
    scale = np.ascontiguousarray(planes[:, : 2 * num_heads]).view(np.float16)
    codes = planes[:, 2 * num_heads :].reshape(shape.num_planes, num_heads, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        return shape.bytes_of(_from_e4m3(codes) * scale.astype(np.float32)[..., None])


def _to_e4m3(numbers: Floats) -> Bytes:
    """Round to the nearest, ties to even."""
    numbers = np.clip(numbers, -_LARGEST, _LARGEST)
    size = np.abs(numbers)
    bits = size.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (_EXPONENT_SHIFT << 3)
    subnormal = (size + _SUBNORMAL_MAGIC).view(np.uint32) - _SUBNORMAL_MAGIC.view(np.uint32)
    code = np.where(size < _SMALLEST_NORMAL, subnormal, normal)
    codes: Bytes = (code | (numbers.view(np.uint32) >> 24 & 0x80)).astype(np.uint8)
    return codes


def _from_e4m3(codes: Bytes) -> Floats:
    every = np.arange(128, dtype=np.uint32)
    normal = ((every << 20) + np.uint32(_EXPONENT_SHIFT << 23)).view(np.float32)
    size = np.where(every < 8, every.astype(np.float32) / np.float32(512), normal)
    both: Floats = np.concatenate([size, -size])
    return both[codes]


FP8 = Method("fp8", False, _encoded_bytes, _encode, _decode)
