"""fp8 on the device: float8 e4m3 and a scale per token and head: see `penstock/codec/fp8.py`.

A program has some heads of one plane. Hopper has the conversion as an instruction, which rounds to
nearest even and stops at 448. A block encoded here is the block encoded on a CPU, bit for bit, as
long as it holds numbers.

Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS: Final = 4096
_LARGEST = tl.constexpr(448.0)
_SCALE_MAX = tl.constexpr(65504.0)


def fp8_bytes(pool: Tensor) -> int:
    """Return the bytes of an encoded block, of a pool as `encode_fp8` takes it."""
    elements = pool[0].numel()
    return elements + 2 * elements // int(pool.shape[-1])


def encode_fp8(pool: Tensor, block_ids: Tensor, encoded: Tensor) -> None:
    """Encode block `block_ids[i]` of a pool into row i of `encoded`.

    `pool` is `[num_blocks, layers, 2, block_size, heads, head_dim]`, contiguous, of float32,
    bfloat16 or float16, `block_ids` `[n]` int64, `encoded` `[n or more, fp8_bytes or more]` uint8
    with contiguous rows that begin at even addresses. What is behind the bytes of a row stays as
    it is.
    """
    _launch(pool, block_ids, encoded, is_encoding=True)


def decode_fp8(encoded: Tensor, pool: Tensor, block_ids: Tensor) -> None:
    """Decode row i of `encoded` into block `block_ids[i]` of a pool; both as `encode_fp8` says."""
    _launch(pool, block_ids, encoded, is_encoding=False)


def _launch(pool: Tensor, block_ids: Tensor, encoded: Tensor, *, is_encoding: bool) -> None:
    _, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads, padded_dim = block_size * num_kv_heads, triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_heads), max(1, _ELEMENTS // padded_dim))
    assert pool.is_contiguous(), pool.stride()
    assert head_dim % 16 == 0, head_dim
    assert encoded.shape[0] >= len(block_ids), (encoded.shape, len(block_ids))
    assert encoded.shape[1] >= fp8_bytes(pool), (encoded.shape, fp8_bytes(pool))
    assert encoded.stride(1) == 1, encoded.stride()
    assert encoded.data_ptr() % 2 == encoded.stride(0) % 2 == 0, "scales are of 16 bits"
    if len(block_ids) == 0:
        return
    kernel = _encode if is_encoding else _decode
    kernel[len(block_ids) * triton.cdiv(num_heads, heads), 2 * num_layers](
        pool, block_ids, encoded, encoded.stride(0), NUM_PLANES=2 * num_layers,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, HEADS=heads,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _encode(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, HEADS: tl.constexpr,
) -> None:  # fmt: skip
    numbers, scales, codes, head, is_head, places, is_place = _place(
        pool, block_ids, encoded, encoded_row, NUM_PLANES, NUM_HEADS, HEAD_DIM, PADDED_DIM, HEADS
    )  # fmt: skip
    x = tl.load(numbers + places, mask=is_place, other=0.0).to(tl.float32)
    scale = tl.minimum(tl.div_rn(tl.max(tl.abs(x), 1), _LARGEST), _SCALE_MAX).to(tl.float16)
    tl.store(scales + head, scale, mask=is_head)
    scale = scale.to(tl.float32)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    code = (x * inverse[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + places, code, mask=is_place)


@triton.jit
def _decode(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, HEADS: tl.constexpr,
) -> None:  # fmt: skip
    numbers, scales, codes, head, is_head, places, is_place = _place(
        pool, block_ids, encoded, encoded_row, NUM_PLANES, NUM_HEADS, HEAD_DIM, PADDED_DIM, HEADS
    )  # fmt: skip
    scale = tl.load(scales + head, mask=is_head, other=0.0).to(tl.float32)
    code = tl.load(codes + places, mask=is_place, other=0)
    x = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(numbers + places, x.to(pool.dtype.element_ty), mask=is_place)


@triton.jit
def _place(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, HEADS: tl.constexpr,
) -> tuple[Pointer, Pointer, Pointer, Tile, Tile, Tile, Tile]:  # fmt: skip
    """Return where a plane's numbers, scales and codes begin, a program's heads, and the places of
    their elements in the plane.
    """
    ELEMENTS: tl.constexpr = NUM_HEADS * HEAD_DIM
    TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    row, plane = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(1)
    block = tl.load(block_ids + row)
    numbers = pool + (block * NUM_PLANES + plane) * ELEMENTS
    to = encoded + row * encoded_row + plane * (ELEMENTS + 2 * NUM_HEADS)
    head = tl.program_id(0) % TILES * HEADS + tl.arange(0, HEADS)
    dim, is_head = tl.arange(0, PADDED_DIM), head < NUM_HEADS
    places = head[:, None] * HEAD_DIM + dim[None, :]
    is_place = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    scales = to.to(tl.pointer_type(tl.float16))
    return numbers, scales, to + 2 * NUM_HEADS, head, is_head, places, is_place
