"""The codecs that run on a device, by the names that they have in `penstock/codec/codec.py`.

Lossless has none: what it makes has as many bytes as it comes to, and its coder goes symbol by
symbol. Nor has the sparse one, which is there to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from penstock.engine.triton.affine import affine_shape, decode_affine, encode_affine
from penstock.engine.triton.fp8 import decode_fp8, encode_fp8, fp8_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TritonCodec:
    """One method: launchers that wait for nothing, and the bytes of an encoded block of a pool."""

    encode: Callable[[Tensor, Tensor, Tensor], None]
    """Of a pool, block ids and the rows to encode into: see `affine.encode_affine`."""
    decode: Callable[[Tensor, Tensor, Tensor], None]
    """Of rows, the pool to decode into, and block ids."""
    encoded_bytes: Callable[[Tensor], int]


def _affine(bits: int) -> TritonCodec:
    return TritonCodec(
        encode=partial(encode_affine, bits=bits),
        decode=partial(decode_affine, bits=bits),
        encoded_bytes=lambda pool: affine_shape(pool, bits).encoded_bytes,
    )


TRITON_CODECS: Final = {
    "fp8": TritonCodec(encode_fp8, decode_fp8, fp8_bytes),
    "int8": _affine(8),
    "int4": _affine(4),
}
"""Every codec that a device has, by name. Which bytes come out is the codec's own affair."""
