"""Paged attention: prefill chunks, decode and mixtures of both, over the block-major pool.

A program has a tile of queries of one sequence times the query heads of one KV head, and walks over
the slots that any of them sees: keys and values are read once for the whole group of heads, through
the block table, straight from the pool. Where there are too few sequences to fill the device, their
slots are divided among several programs, and `merge_splits` puts the parts together.

Lengths are read on the device, so a captured launch holds for any lengths. The call is the same for
prefill and decode, but decoding rows are quicker in a call of their own: see `Sequences.part`.

Source: Dao, FlashAttention-2, arXiv 2307.08691; Ringlein et al., arXiv 2511.11581.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Scalar, Size, Tile
from penstock.engine.triton.merge_splits import merge_splits

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec

SPLITS_MAX: Final = 32
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Say which rows are whose, and where their KV lies. Tensors are on the device.

    query_start    [S + 1] int32; sequence i has rows [query_start[i], query_start[i + 1])
    kv_len         [S] int32; 0 is a sequence of padding, whose rows come out as 0
    block_table    [S, W] int32, any row stride; entries that no row sees are not followed
    num_rows       rows of all of them, or more
    max_query_len  most rows of one of them, or more; 1 asks for the kernel that decodes
    """

    query_start: Tensor
    kv_len: Tensor
    block_table: Tensor
    num_rows: int
    max_query_len: int

    def part(self, first: int, end: int, num_rows: int, max_query_len: int) -> Sequences:
        """Return sequences [first, end), which have `num_rows` rows. Queries and output stay whole:
        rows are counted from the beginning of the batch.
        """
        return Sequences(
            self.query_start[first : end + 1],
            self.kv_len[first:end],
            self.block_table[first:end],
            num_rows,
            max_query_len,
        )


@dataclass(frozen=True, slots=True, eq=False)
class SplitSpace:
    """Workspace of a launch that divides slots among `SPLITS` programs, for up to N rows.

    output  [SPLITS, N, num_heads, head_dim] float32, contiguous
    lse     [SPLITS, N, num_heads] float32, contiguous: logarithms, to base 2, of the softmax's sums
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class TileShape:
    """Queries times heads and slots of a tile, warps of a program, depth of its pipeline."""

    rows: int
    slots: int
    num_warps: int
    num_stages: int


def decode_splits(num_sequences: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Return among how many programs to divide a sequence's slots, so that two fit a processor.

    A power of two up to `SPLITS_MAX`. Depends on nothing that changes while a graph is replayed.
    """
    programs = max(1, num_sequences * num_kv_heads)
    wanted = 2 * num_multiprocessors // programs
    return min(SPLITS_MAX, 1 << max(0, wanted.bit_length() - 1))


def tile_shape(spec: AttentionSpec, dtype: torch.dtype, max_query_len: int) -> TileShape:
    """Return the tile for a layer. Those of 64 rows and more use Hopper's warp-group products."""
    group = spec.num_heads // spec.num_kv_heads
    is_wide = spec.head_dim > 128
    if dtype == torch.float32:
        # Exact products go without matrix instructions and take registers instead.
        return TileShape(max(16, triton.next_power_of_2(group)), 16 if is_wide else 32, 8, 2)
    rows = max(16, triton.next_power_of_2(max_query_len * group))
    if rows < 64:
        return TileShape(rows, 32 if is_wide else 64, 4, 3)
    rows = max(min(rows, 128), triton.next_power_of_2(group))
    return TileShape(rows, 32 if is_wide else 64, 4 if rows == 64 else 8, 3)


def num_tiles(spec: AttentionSpec, dtype: torch.dtype, sequences: Sequences) -> int:
    """Return how many programs a launch has for each KV head and split."""
    if sequences.max_query_len == 1:
        return len(sequences.kv_len)
    rows = tile_shape(spec, dtype, sequences.max_query_len).rows
    # One sequence's rows may begin a tile each, which makes at most one tile more.
    queries = rows // (spec.num_heads // spec.num_kv_heads)
    return len(sequences.kv_len) + sequences.num_rows // queries


def paged_attention(
    spec: AttentionSpec,
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    sequences: Sequences,
    output: Tensor,
    *,
    splits: SplitSpace | None = None,
) -> None:
    """Write the attention output of every row that belongs to a sequence; others stay as they are.

    `query` and `output` are `[T, num_heads, head_dim]` of one dtype (bfloat16, float16, float32),
    any strides but that of the last dimension. `cache` is a layer's keys and values,
    `[num_blocks, block_size, num_kv_heads, head_dim]` each, strided views of one pool. Row i of a
    sequence with n rows sees the slots up to `kv_len - n + i`. Slots that no row sees are never
    read. `spec.sinks` is on the device.
    """
    key_cache, value_cache = cache
    assert key_cache.stride() == value_cache.stride(), (key_cache.stride(), value_cache.stride())
    assert query.stride(2) == output.stride(2) == key_cache.stride(3) == 1, "heads are contiguous"
    assert query.dtype == key_cache.dtype == output.dtype, (query.dtype, key_cache.dtype)
    group = spec.num_heads // spec.num_kv_heads
    tile = tile_shape(spec, query.dtype, sequences.max_query_len)
    num_sequences = len(sequences.kv_len)
    is_decode = sequences.max_query_len == 1
    target = output if splits is None else splits.output[0]
    num_splits = 1 if splits is None else len(splits.output)
    assert splits is None or target.shape[0] >= sequences.num_rows, (target.shape, sequences)
    assert num_splits & (num_splits - 1) == 0, num_splits
    _attend[num_tiles(spec, query.dtype, sequences), spec.num_kv_heads, num_splits](
        query, key_cache, value_cache, target, target if splits is None else splits.lse,
        sequences.block_table, sequences.kv_len, sequences.query_start,
        query if spec.sinks is None else spec.sinks,
        spec.scale, spec.softcap, spec.window, num_sequences,
        *query.stride()[:2], *key_cache.stride()[:3], *target.stride()[:2],
        target.shape[0], sequences.block_table.stride(0),
        GROUP=group, HEAD_DIM=spec.head_dim, PADDED_DIM=triton.next_power_of_2(spec.head_dim),
        BLOCK_SIZE=key_cache.shape[1], ROWS=tile.rows, SLOTS=tile.slots, SPLITS=num_splits,
        IS_DECODE=is_decode, HAS_SINKS=spec.sinks is not None, HAS_SOFTCAP=spec.softcap != 0.0,
        HAS_WINDOW=spec.window != 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if splits is not None:
        merge_splits(splits.output, splits.lse, output, sequences.query_start)


@triton.jit
def _attend(
    query: Pointer, key_cache: Pointer, value_cache: Pointer, output: Pointer, lse: Pointer,
    block_table: Pointer, kv_len: Pointer, query_start: Pointer, sinks: Pointer,
    scale: Scalar, softcap: Scalar, window: Size, num_sequences: Size,
    query_row: Size, query_head: Size, cache_block: Size, cache_slot: Size, cache_head: Size,
    output_row: Size, output_head: Size, output_rows: Size, table_row: Size,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:  # fmt: skip
    QUERIES: tl.constexpr = 1 if IS_DECODE else ROWS // GROUP
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if IS_DECODE:
        sequence, first = tl.program_id(0), 0
    else:
        sequence, first = _place(query_start, num_sequences, QUERIES)
    start = tl.load(query_start + sequence)
    num_rows = tl.load(query_start + sequence + 1) - start
    if first >= num_rows:
        return
    length = tl.load(kv_len + sequence)
    # Rows of a split's output are counted from the first row of these sequences.
    origin = tl.load(query_start) if SPLITS > 1 else 0
    # Rows of the tile: the heads of the first query, those of the second, and so on.
    tile_row, dim = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    row, head = first + tile_row // GROUP, kv_head * GROUP + tile_row % GROUP
    is_row = (row < num_rows) & (tile_row < QUERIES * GROUP)
    is_element = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    rows = (start + row).to(tl.int64)
    places = rows[:, None] * query_row + head[:, None] * query_head + dim[None, :]
    q = tl.load(query + places, mask=is_element, other=0.0)

    position, oldest = length - num_rows + row, length - num_rows + first
    visible, begin, end = _share(
        oldest, length, window, split, QUERIES, SLOTS, SPLITS, HAS_WINDOW
    )  # fmt: skip
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2_E
        largest, total = tl.where(split == 0, sink, largest), tl.where(split == 0, 1.0, total)
    summed = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    table = block_table + sequence.to(tl.int64) * table_row
    keys, values = key_cache + kv_head * cache_head, value_cache + kv_head * cache_head
    whole = begin
    if not HAS_WINDOW:
        whole = tl.maximum(begin, tl.minimum(end, oldest + 1) // SLOTS * SLOTS)
        for slot in range(begin, whole, SLOTS):
            summed, largest, total = _visit(
                q, keys, values, table, summed, largest, total, slot, position, visible, end,
                scale, softcap, window, cache_block, cache_slot,
                HEAD_DIM, PADDED_DIM, BLOCK_SIZE, SLOTS, False, HAS_SOFTCAP, HAS_WINDOW,
            )  # fmt: skip
    for slot in range(whole, end, SLOTS):
        summed, largest, total = _visit(
            q, keys, values, table, summed, largest, total, slot, position, visible, end,
            scale, softcap, window, cache_block, cache_slot,
            HEAD_DIM, PADDED_DIM, BLOCK_SIZE, SLOTS, True, HAS_SOFTCAP, HAS_WINDOW,
        )  # fmt: skip
    _finish(
        output, lse, summed, largest, total, rows - origin, head, dim, is_row, is_element, split,
        output_row, output_head, output_rows, SPLITS,
    )  # fmt: skip


@triton.jit
def _place(query_start: Pointer, num_sequences: Size, QUERIES: tl.constexpr) -> tuple[Tile, Tile]:
    """Return the sequence that a program's tile belongs to, and the first of its rows there.

    The tiles of sequence i begin at `query_start[i] // QUERIES + i`, from the beginning of these
    sequences. The last are taken first: they see most, and would be what the others wait for.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    origin = tl.load(query_start)
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if (tl.load(query_start + middle) - origin) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    tiles_before = (tl.load(query_start + sequence) - origin) // QUERIES + sequence
    return sequence, (tile - tiles_before) * QUERIES


@triton.jit
def _share(
    oldest: Tile, length: Tile, window: Size, split: Tile,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Return the first slot that a tile's rows see, and the slots [begin, end) of this program.

    `oldest` is the position of the tile's first row; `begin` is the beginning of a tile of slots.
    """
    end, visible = tl.minimum(oldest + QUERIES, length), 0
    if HAS_WINDOW:
        visible = tl.maximum(0, oldest - window + 1)
    begin = visible // SLOTS * SLOTS
    if SPLITS > 1:
        share = tl.cdiv(end - begin, SPLITS * SLOTS) * SLOTS
        begin += split * share
        end = tl.minimum(end, begin + share)
    return visible, begin, end


@triton.jit
def _visit(
    q: Tile, keys: Pointer, values: Pointer, table: Pointer,
    summed: Tile, largest: Tile, total: Tile, slot: Tile, position: Tile, visible: Tile, end: Tile,
    scale: Scalar, softcap: Scalar, window: Size, cache_block: Size, cache_slot: Size,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, IS_MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Attend to one tile of slots; return the sum of values, the largest score and the weights."""
    slots, dim = slot + tl.arange(0, SLOTS), tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    is_slot = slots < end
    if HAS_WINDOW:
        is_slot = is_slot & (slots >= visible)
    if IS_MASKED:
        blocks = tl.load(table + slots // BLOCK_SIZE, mask=is_slot, other=0)
    else:
        blocks = tl.load(table + slots // BLOCK_SIZE)
    # 64 bits, since a pool has more than 2^31 elements.
    places = blocks.to(tl.int64) * cache_block + (slots % BLOCK_SIZE) * cache_slot
    if IS_MASKED:
        is_key, is_value = is_slot[None, :] & is_dim[:, None], is_slot[:, None] & is_dim[None, :]
    else:
        is_key, is_value = is_dim[:, None], is_dim[None, :]
    k = tl.load(keys + places[None, :] + dim[:, None], mask=is_key, other=0.0)
    scores = tl.dot(q, k, input_precision="ieee")
    if HAS_SOFTCAP:
        scores = softcap - 2.0 * softcap / (1.0 + tl.exp(scores * (2.0 * scale / softcap)))
        scores = scores * _LOG2_E
    else:
        scores = scores * (scale * _LOG2_E)
    if IS_MASKED:
        is_seen = (slots[None, :] <= position[:, None]) & is_slot[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & (slots[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf minus -inf is no number.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    v = tl.load(values + places[:, None] + dim[None, :], mask=is_value, other=0.0)
    summed = tl.dot(weights.to(v.dtype), v, summed * fade[:, None], input_precision="ieee")
    return summed, higher, total


@triton.jit
def _finish(
    output: Pointer, lse: Pointer, summed: Tile, largest: Tile, total: Tile,
    rows: Tile, head: Tile, dim: Tile, is_row: Tile, is_element: Tile, split: Tile,
    output_row: Size, output_head: Size, output_rows: Size, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """Store what a program has found: the output, or its split's part of it."""
    has_seen = total > 0.0
    result = summed / tl.where(has_seen, total, 1.0)[:, None]
    places = rows[:, None] * output_row + head[:, None] * output_head + dim[None, :]
    if SPLITS > 1:
        # Here heads lie behind one another: [SPLITS, rows, heads, head_dim].
        num_heads = output_row // output_head
        row_of_split = split.to(tl.int64) * output_rows + rows
        places = places + split.to(tl.int64) * output_rows * output_row
        is_element = is_element & has_seen[:, None]
        found = tl.where(has_seen, largest + tl.log2(tl.where(has_seen, total, 1.0)), float("-inf"))
        tl.store(lse + row_of_split * num_heads + head, found, mask=is_row)
    tl.store(output + places, result.to(output.dtype.element_ty), mask=is_element)
