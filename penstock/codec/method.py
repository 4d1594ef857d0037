"""What a compression method is: sizes, and the numpy reference of its two directions.

Owns the shape of a block as methods see it, and blocks as floats. The files beside this one are one
method each; `codec.py` chooses between them and the native kernels, which give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.block import DTYPE_BYTES, KVLayout
from penstock.transfer.reshape import convert

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_STORED: Final = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
_HEAD_DIM_MAX: Final = 1024
_GROUP_MAX: Final = 32


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A group's blocks, [num_planes, block_size, width]: even planes are keys, odd ones values."""

    num_planes: int
    block_size: int
    width: int
    """KV heads times head size."""
    head_dim: int
    dtype: str

    @property
    def num_elements(self) -> int:
        """Numbers in a block."""
        return self.num_planes * self.block_size * self.width

    @property
    def element_bytes(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as it lies in the pool."""
        return self.num_elements * self.element_bytes

    @property
    def key_group(self) -> int:
        """Tokens of a channel of the keys that share a scale."""
        return gcd(self.block_size, _GROUP_MAX)

    @property
    def value_group(self) -> int:
        """Channels of a token of the values that share a scale."""
        return gcd(self.head_dim, _GROUP_MAX)

    def floats(self, block: Bytes) -> Floats:
        """Return the numbers of a block, [num_planes, block_size, width]."""
        stored = block.view(_STORED[self.dtype])
        shape = (self.num_planes, self.block_size, self.width)
        return convert(stored, self.dtype, "float32").astype(np.float32).reshape(shape)

    def bytes_of(self, numbers: Floats) -> Bytes:
        """Return numbers as a block holds them, rounded to nearest even."""
        return convert(numbers.reshape(-1), "float32", self.dtype).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to encode a block; pure functions over one block, `[block_bytes]` uint8.

    `decode` is given at least what `encode` returned, and raises `BlocksCorrupt` for what cannot
    have been encoded.
    """

    name: str
    is_lossless: bool
    encoded_bytes: Callable[[BlockShape], int]
    """The bytes that `encode` returns; of a lossless method the most that it may."""
    encode: Callable[[BlockShape, Bytes], Bytes]
    decode: Callable[[BlockShape, Bytes], Bytes]


def block_shape(layout: KVLayout, group: int = 0) -> BlockShape:
    """Return the shape of a group's blocks.

    Raises: `ValueError` for heads or blocks that the codecs are not made for.
    """
    if layout.head_dim % 16 or layout.head_dim > _HEAD_DIM_MAX or layout.block_size % 2:
        raise ValueError(
            f"KV codecs want a head size that is a multiple of 16, {_HEAD_DIM_MAX} at most, and an "
            f"even block size, not {layout.head_dim} and {layout.block_size}"
        )
    return BlockShape(
        num_planes=2 * len(layout.groups[group].layers),
        block_size=layout.block_size,
        width=layout.num_kv_heads * layout.head_dim,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )
