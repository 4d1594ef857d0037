"""Launches of what works on whole blocks, codecs among it, in the shapes of real models."""

import torch

from penstock.engine.triton.affine import affine_shape, decode_affine, encode_affine
from penstock.engine.triton.digest import digest_blocks, digest_space
from penstock.engine.triton.fp8 import decode_fp8, encode_fp8, fp8_bytes

SHAPE = 2, 3, 2, 32, 8, 128


def affine(bits: int, dtype: torch.dtype = torch.bfloat16, *, is_encoding: bool) -> None:
    pool, ids = torch.empty(SHAPE, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    encoded = torch.empty(1, affine_shape(pool, bits).encoded_bytes, dtype=torch.uint8)
    if is_encoding:
        encode_affine(pool, ids, encoded, bits=bits)
    else:
        decode_affine(encoded, pool, ids, bits=bits)


def fp8(*, is_encoding: bool) -> None:
    pool, ids = torch.empty(SHAPE, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    encoded = torch.empty(1, fp8_bytes(pool), dtype=torch.uint8)
    if is_encoding:
        encode_fp8(pool, ids, encoded)
    else:
        decode_fp8(encoded, pool, ids)


def digest() -> None:
    blocks = torch.empty(2, 32 * 2 * 32 * 8 * 128 * 2, dtype=torch.uint8)
    ids = torch.zeros(2, dtype=torch.int64)
    digest_blocks(blocks, ids, digest_space(blocks, 2), torch.empty_like(ids))


MOVE_LAUNCHES = {
    "int8 encode": lambda: affine(8, is_encoding=True),
    "int4 encode": lambda: affine(4, is_encoding=True),
    "int4 encode, float32": lambda: affine(4, torch.float32, is_encoding=True),
    "fp8 encode": lambda: fp8(is_encoding=True),
    "int8 decode": lambda: affine(8, is_encoding=False),
    "int4 decode": lambda: affine(4, is_encoding=False),
    "fp8 decode": lambda: fp8(is_encoding=False),
    "digest": digest,
}
