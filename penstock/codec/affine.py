"""Numbers as low + scale * code, with a low and a scale for each group of them.

Keys have channels that are large in every token, so a group is one channel over up to 32 tokens;
values have none, so a group is up to 32 channels of one token. A plane is low and scale, float16,
`[num_groups]` each, then codes. `int8.py` and `int4.py` say how many bits a code has and how codes
lie; the native twin is `native/affine.cpp`.

Source: Liu et al., KIVI: A tuning-free asymmetric 2bit quantization for KV cache, arXiv 2402.02750.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.codec.method import BlockShape, Bytes, Floats, Method

_LARGEST: Final = np.float32(np.finfo(np.float16).max)
Codes = npt.NDArray[np.uint8]


def affine_method(
    bits: int, pack: Callable[[Codes], Codes], unpack: Callable[[Codes], Codes]
) -> Method:
    """Return the method with codes of so many bits.

    `pack` takes the codes of a plane, `[block_size, width]`, to bytes `[rows, width]`, and `unpack`
    back. Numbers beyond those of float16 come back as its largest; what is not a number comes back
    as one.
    """

    def encoded_bytes(shape: BlockShape) -> int:
        return sum(4 * groups + packed for groups, packed in _sizes(shape, bits))

    def encode(shape: BlockShape, block: Bytes) -> Bytes:
        parts = []
        for plane, numbers in enumerate(shape.floats(block)):
            low, scale, codes = _quantize(_grouped(shape, plane, numbers), plane, 2**bits - 1)
            packed = pack(codes.reshape(numbers.shape))
            parts += [part.reshape(-1).view(np.uint8) for part in (low, scale, packed)]
        return np.concatenate(parts)

    def decode(shape: BlockShape, encoded: Bytes) -> Bytes:
        numbers = np.empty((shape.num_planes, shape.block_size, shape.width), np.float32)
        start = 0
        for plane, (groups, packed) in enumerate(_sizes(shape, bits)):
            middle, end = start + 4 * groups, start + 4 * groups + packed
            parameters = encoded[start:middle].view(np.float16).reshape(2, groups)
            codes = unpack(encoded[middle:end].reshape(-1, shape.width))
            grouped = _grouped(shape, plane, codes.astype(np.float32))
            wide = _parameters_like(grouped, plane, parameters.astype(np.float32))
            with np.errstate(invalid="ignore", over="ignore"):
                numbers[plane] = (wide[0] + wide[1] * grouped).reshape(numbers[plane].shape)
            start = end
        with np.errstate(invalid="ignore", over="ignore"):
            return shape.bytes_of(numbers)

    return Method(f"int{bits}", False, encoded_bytes, encode, decode)


def _sizes(shape: BlockShape, bits: int) -> Iterator[tuple[int, int]]:
    """Yield for every plane its groups, and the bytes of its codes."""
    elements = shape.block_size * shape.width
    for plane in range(shape.num_planes):
        group = shape.value_group if plane % 2 else shape.key_group
        yield elements // group, elements * bits // 8


def _grouped(shape: BlockShape, plane: int, numbers: Floats) -> Floats:
    """Return a plane's numbers with the members of a group along one axis: see `_axis`."""
    if plane % 2:
        return numbers.reshape(shape.block_size, -1, shape.value_group)
    return numbers.reshape(-1, shape.key_group, shape.width)


def _axis(plane: int) -> int:
    return 2 if plane % 2 else 1


def _parameters_like(grouped: Floats, plane: int, parameters: Floats) -> Floats:
    """Return low and scale, `[2, num_groups]`, so that they broadcast over grouped numbers."""
    shape = list(grouped.shape)
    shape[_axis(plane)] = 1
    return parameters.reshape(2, *shape)


def _quantize(
    grouped: Floats, plane: int, levels: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], Codes]:
    """Return low, scale and codes; the same sums in the same order as the native kernels."""
    axis, zero = _axis(plane), np.float32(0)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        # Adding zero makes one of the two zeros.
        lowest = np.clip(grouped.min(axis, keepdims=True), -_LARGEST, _LARGEST) + zero
        low = lowest.astype(np.float16)
        spread = grouped.max(axis, keepdims=True) - low.astype(np.float32)
        steps = np.clip(spread / np.float32(levels), zero, _LARGEST) + zero
        scale = steps.astype(np.float16)
        exact = scale.astype(np.float32)
        inverse = np.where(exact > 0, np.float32(1) / exact, zero)
        place = np.clip((grouped - low.astype(np.float32)) * inverse, zero, np.float32(levels))
        codes = np.nan_to_num(place + np.float32(0.5)).astype(np.uint8)
    return low, scale, codes
