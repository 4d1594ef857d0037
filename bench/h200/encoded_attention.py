"""Decode attention over blocks that stay encoded in the GPU's memory, and are read as they are.

An experiment for the benchmark, not part of the engine: KVFlow keeps cold blocks compressed, and
what a step then reads is compared here on real hardware. Blocks are those of the codecs, fp8 and
int4, with 32 tokens. A scale of fp8 belongs to a token and head, so it goes onto the scores and the
weights; low and scale of int4's keys belong to a channel, so they go onto the query; those of its
values are undone in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Scalar, Size, Tile

BLOCK_SIZE, GROUP = 32, 32


@dataclass(frozen=True)
class EncodedPool:
    """Encoded blocks of a model's layers: `rows` is `[num_blocks, encoded_bytes]` uint8."""

    rows: torch.Tensor
    name: str
    num_kv_heads: int
    head_dim: int

    @property
    def plane_bytes(self) -> int:
        """Bytes of a layer's keys, or values, of a block."""
        elements = BLOCK_SIZE * self.num_kv_heads * self.head_dim
        if self.name == "fp8":
            return elements + 2 * BLOCK_SIZE * self.num_kv_heads
        return elements // 2 + 4 * elements // GROUP


def attend_encoded(
    pool: EncodedPool,
    layer: int,
    query: torch.Tensor,
    table: torch.Tensor,
    kv_len: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Write the attention of one query a sequence, `[S, num_heads, head_dim]` bfloat16 each.

    `table` is `[S, W]` int32, `kv_len` `[S]` int32.
    """
    num_heads, head_dim = query.shape[1:]
    group = num_heads // pool.num_kv_heads
    assert head_dim % GROUP == 0, head_dim
    _attend[len(kv_len), pool.num_kv_heads](
        query, pool.rows, table, kv_len, output, pool.rows.stride(0), table.stride(0),
        head_dim**-0.5 * 1.4426950408889634, layer * 2 * pool.plane_bytes,
        PLANE=pool.plane_bytes, HEADS=num_heads, KV_HEADS=pool.num_kv_heads, GROUP=group,
        HEAD_DIM=head_dim, ROWS=max(16, triton.next_power_of_2(group)), IS_FP8=pool.name == "fp8",
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _attend(
    query: Pointer, rows: Pointer, table: Pointer, kv_len: Pointer, output: Pointer,
    row_bytes: Size, table_row: Size, scale: Scalar, first: Size,
    PLANE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, IS_FP8: tl.constexpr,
) -> None:  # fmt: skip
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    head, is_row = kv_head * GROUP + row, row < GROUP
    places = (sequence * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + places, mask=is_row[:, None], other=0.0)
    length = tl.load(kv_len + sequence)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for slot in range(0, length, 32):
        block = tl.load(table + sequence * table_row + slot // 32).to(tl.int64)
        keys = rows + block * row_bytes + first
        if IS_FP8:
            summed, largest, total = _visit_fp8(
                q, keys, keys + PLANE, kv_head, slot, length, scale, summed, largest, total,
                KV_HEADS, HEAD_DIM,
            )  # fmt: skip
        else:
            for half in tl.static_range(2):
                summed, largest, total = _visit_int4(
                    q, keys, keys + PLANE, kv_head, slot, half, length, scale, summed, largest,
                    total, KV_HEADS, HEAD_DIM,
                )  # fmt: skip
    result = summed / total[:, None]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _visit_fp8(
    q: Tile, keys: Pointer, values: Pointer, kv_head: Tile, slot: Tile, length: Tile,
    scale: Scalar, summed: Tile, largest: Tile, total: Tile,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    token, dim = tl.arange(0, 32), tl.arange(0, HEAD_DIM)
    places = token[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + dim[None, :]
    scales = token * KV_HEADS + kv_head
    half = tl.pointer_type(tl.float16)
    codes = tl.load(keys + 2 * 32 * KV_HEADS + places)
    k = codes.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    factor = tl.load(keys.to(half) + scales).to(tl.float32)
    scores = tl.dot(q, tl.trans(k)) * (factor[None, :] * scale)
    scores = tl.where((slot + token < length)[None, :], scores, float("-inf"))
    weights, fade, largest, total = _softmax(scores, largest, total)
    codes = tl.load(values + 2 * 32 * KV_HEADS + places)
    v = codes.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    factor = tl.load(values.to(half) + scales).to(tl.float32)
    weights = (weights * factor[None, :]).to(tl.bfloat16)
    return tl.dot(weights, v, summed * fade[:, None]), largest, total


@triton.jit
def _visit_int4(
    q: Tile, keys: Pointer, values: Pointer, kv_head: Tile, slot: Tile, half: tl.constexpr,
    length: Tile, scale: Scalar, summed: Tile, largest: Tile, total: Tile,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Attend to the even tokens of a block, or to the odd ones: they share bytes."""
    WIDTH: tl.constexpr = KV_HEADS * HEAD_DIM
    SOME: tl.constexpr = HEAD_DIM // 32
    pair, dim = tl.arange(0, 16), tl.arange(0, HEAD_DIM)
    token = 2 * pair + half
    places = pair[:, None] * WIDTH + kv_head * HEAD_DIM + dim[None, :]
    number = tl.pointer_type(tl.float16)
    low = tl.load(keys.to(number) + kv_head * HEAD_DIM + dim).to(tl.float32)
    factor = tl.load(keys.to(number) + WIDTH + kv_head * HEAD_DIM + dim).to(tl.float32)
    codes = tl.load(keys + 4 * WIDTH + places) >> (4 * half) & 15
    # q (low + factor code) = q low + (q factor) code
    wide = q.to(tl.float32)
    turned = (wide * factor[None, :]).to(tl.bfloat16)
    scores = tl.dot(turned, tl.trans(codes.to(tl.float32).to(tl.bfloat16)))
    scores = (scores + tl.sum(wide * low[None, :], 1)[:, None]) * scale
    scores = tl.where((slot + token < length)[None, :], scores, float("-inf"))
    weights, fade, largest, total = _softmax(scores, largest, total)
    codes = tl.load(values + 4 * WIDTH + places) >> (4 * half) & 15
    group = token[:, None] * (WIDTH // 32) + kv_head * SOME + tl.arange(0, SOME)[None, :]
    lows = tl.load(values.to(number) + group).to(tl.float32)[:, :, None]
    factors = tl.load(values.to(number) + WIDTH + group).to(tl.float32)[:, :, None]
    v = lows + factors * tl.reshape(codes, [16, SOME, 32]).to(tl.float32)
    v = tl.reshape(v, [16, HEAD_DIM]).to(tl.bfloat16)
    return tl.dot(weights.to(tl.bfloat16), v, summed * fade[:, None]), largest, total


@triton.jit
def _softmax(scores: Tile, largest: Tile, total: Tile) -> tuple[Tile, Tile, Tile, Tile]:
    """Return weights, what earlier ones fade by, and the new largest score and sum."""
    higher = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights, fade = tl.exp2(scores - shift[:, None]), tl.exp2(largest - shift)
    return weights, fade, higher, total * fade + tl.sum(weights, 1)
