"""Sparsified: of the numbers of a token and head the larger half, as they are; the others are zero.

A head is a bitmap `[head_dim]` bits, lowest first, and the numbers that it marks, in order. Of
equally large ones the first are kept. The native twin is `native/sparse.cpp`.

Source: Joo et al., Mustafar: Promoting unstructured sparsity for KV cache pruning in LLM inference,
arXiv 2505.22913: pruned by magnitude per token, bitmap and values.
"""

from __future__ import annotations

import numpy as np

from penstock.codec.method import BlockShape, Bytes, Method


def _encoded_bytes(shape: BlockShape) -> int:
    head_bytes = shape.head_dim // 8 + shape.head_dim // 2 * shape.element_bytes
    return shape.num_elements // shape.head_dim * head_bytes


def _encode(shape: BlockShape, block: Bytes) -> Bytes:
    bits = block.view(f"u{shape.element_bytes}").reshape(-1, shape.head_dim)
    largest_first = np.argsort(-(bits << 1).astype(np.int64), axis=1, kind="stable")
    marks = np.zeros(bits.shape, bool)
    np.put_along_axis(marks, largest_first[:, : shape.head_dim // 2], True, 1)
    kept = bits[marks].reshape(len(bits), -1).view(np.uint8)
    return np.concatenate([np.packbits(marks, 1, "little"), kept], 1).reshape(-1)


def _decode(shape: BlockShape, encoded: Bytes) -> Bytes:
    heads = encoded[: _encoded_bytes(shape)].reshape(
        -1, _encoded_bytes(shape) * shape.head_dim // shape.num_elements
    )
    marks = np.unpackbits(heads[:, : shape.head_dim // 8], axis=1, bitorder="little").astype(bool)
    kept = np.ascontiguousarray(heads[:, shape.head_dim // 8 :]).view(f"u{shape.element_bytes}")
    # Never more numbers than there are, whatever the bitmap says.
    place = np.cumsum(marks, 1) - 1
    marks &= place < kept.shape[1]
    taken = np.take_along_axis(kept, np.clip(place, 0, kept.shape[1] - 1), 1)
    return np.where(marks, taken, 0).astype(kept.dtype).reshape(-1).view(np.uint8)


SPARSE = Method("sparse", False, _encoded_bytes, _encode, _decode)
