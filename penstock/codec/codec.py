"""A codec for one group's blocks: from a pool to a buffer of encoded blocks, and back.

Owns the choice between the native kernels and numpy, which give the same bytes, and the checks
before either touches memory. Does not know tiers, moves or why a block is encoded. A block must be
whole: slots that nobody has written may hold anything, and would spoil what shares a scale with
them, so a partial block crosses as it is. Called by whoever carries out the compression engine's
jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_void_p, cast, pointer
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.codec.fp8 import FP8
from penstock.codec.int4 import INT4
from penstock.codec.int8 import INT8
from penstock.codec.lossless import LOSSLESS
from penstock.codec.method import BlockShape, Method, block_shape
from penstock.codec.native.library import DTYPES, METHODS, Shape, load_library
from penstock.codec.sparse import SPARSE
from penstock.core.block import KVLayout
from penstock.core.errors import BlocksCorrupt
from penstock.native.encoder import NativeEncoder

Bytes2D = npt.NDArray[np.uint8]
CODECS: Final = {method.name: method for method in (LOSSLESS, FP8, INT8, INT4, SPARSE)}
"""Every method, by name."""


def make_codec(name: str, layout: KVLayout, group: int = 0, *, is_native: bool = True) -> Codec:
    """Return the codec of that name for the blocks of a group.

    Raises: `ValueError` for an unknown name, and for blocks that codecs are not made for.
    """
    if name not in CODECS:
        raise ValueError(f"no codec is called {name!r}: one of {', '.join(CODECS)}")
    shape = block_shape(layout, group)
    return Codec(CODECS[name], shape, load_library() if is_native else None)


@dataclass(frozen=True, slots=True)
class Codec:
    """A method for blocks of one shape. Has no state: threads may share it."""

    method: Method
    shape: BlockShape
    library: CDLL | None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def is_lossless(self) -> bool:
        """True when blocks come back bit for bit."""
        return self.method.is_lossless

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the pool."""
        return self.shape.block_bytes

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block; of a lossless codec the most that it may have."""
        return self.method.encoded_bytes(self.shape)

    @property
    def native_encoder(self) -> NativeEncoder | None:
        """How threads that hold no interpreter lock encode; None where nothing was compiled."""
        if self.library is None:
            return None
        function = cast(self.library.penstock_encode, c_void_p).value
        assert function is not None
        return NativeEncoder(function, METHODS.index(self.name), bytes(self._native_shape()))

    def encode(
        self, pool: Bytes2D, block_ids: Sequence[int], encoded: Bytes2D
    ) -> npt.NDArray[np.int64]:
        """Encode block `block_ids[i]` into `encoded[i]`; return the bytes of each, `[n]`.

        `pool` is [num_blocks, block_bytes], `encoded` [n or more, encoded_bytes or more]; both
        contiguous. What is behind the bytes of a row stays as it is.
        """
        ids = self._checked(pool, block_ids, encoded)
        assert encoded.shape[1] >= self.encoded_bytes, (encoded.shape, self.encoded_bytes)
        lengths = np.zeros(len(ids), np.int64)
        if self.library is not None:
            self.library.penstock_encode(
                METHODS.index(self.name),
                pointer(self._native_shape()),
                pool.ctypes.data,
                ids.ctypes.data,
                len(ids),
                encoded.ctypes.data,
                encoded.shape[1],
                lengths.ctypes.data,
            )
            return lengths
        for row, block_id in enumerate(ids):
            content = self.method.encode(self.shape, pool[block_id])
            lengths[row] = len(content)
            encoded[row, : len(content)] = content
        return lengths

    def decode(self, encoded: Bytes2D, pool: Bytes2D, block_ids: Sequence[int]) -> None:
        """Decode `encoded[i]` into block `block_ids[i]`.

        Raises: `BlocksCorrupt` for what cannot have been encoded; the blocks then hold anything.
        Lossy codecs have no such bytes: digests are the tiers' affair. Nothing outside the rows and
        the blocks is read or written, whatever the bytes are.
        """
        ids = self._checked(pool, block_ids, encoded)
        wanted = self.encoded_bytes if not self.is_lossless else _LENGTH_BYTES
        if encoded.shape[1] < wanted:
            raise BlocksCorrupt(f"an encoded block has {wanted} bytes, not {encoded.shape[1]}")
        if self.library is not None:
            failed: int = self.library.penstock_decode(
                METHODS.index(self.name),
                pointer(self._native_shape()),
                encoded.ctypes.data,
                encoded.shape[1],
                len(ids),
                pool.ctypes.data,
                ids.ctypes.data,
            )
            if failed >= 0:
                raise BlocksCorrupt(f"encoded block {failed} of {len(ids)} is none")
            return
        for row, block_id in enumerate(ids):
            pool[block_id] = self.method.decode(self.shape, encoded[row])

    def _checked(
        self, pool: Bytes2D, block_ids: Sequence[int], encoded: Bytes2D
    ) -> npt.NDArray[np.int64]:
        """Return block ids as the native side reads them, which trusts them."""
        ids = np.ascontiguousarray(block_ids, np.int64)
        assert pool.shape == (len(pool), self.block_bytes), (pool.shape, self.shape)
        assert pool.dtype == encoded.dtype == np.uint8, (pool.dtype, encoded.dtype)
        assert pool.flags.c_contiguous, pool.strides
        assert encoded.flags.c_contiguous, encoded.strides
        assert encoded.ndim == 2, encoded.shape
        assert len(encoded) >= len(ids), (encoded.shape, len(ids))
        assert not len(ids) or 0 <= ids.min() <= ids.max() < len(pool), (ids, len(pool))
        return ids

    def _native_shape(self) -> Shape:
        shape = self.shape
        return Shape(
            shape.num_planes,
            shape.block_size,
            shape.width,
            shape.head_dim,
            DTYPES.index(shape.dtype),
        )


_LENGTH_BYTES: Final = 8
"""What a losslessly encoded block begins with: its length, among others."""
