"""What a graph of decode steps needs between two of them, done on the device.

`patch_rows` puts records of rows that the host has changed where the step looks for them, and
`advance_rows` makes the token that was sampled the next one to be computed. Between steps that
change nothing, the second alone runs, and nothing is copied to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.triton.sample import SamplingRows

HEADER_WORDS: Final = 14
"""Of a record, in words of 32 bits: row, kv_len, token (2), position (2), seed (2), top_p (2, a
float64), temperature, min_p (float32), top_k, nothing. Behind it, for each group, block numbers.
"""
_ROW, _KV_LEN, _TOKEN, _POSITION, _SEED, _TOP_P, _TEMPERATURE, _MIN_P, _TOP_K, _HEADER = (
    tl.constexpr(place) for place in (0, 1, 2, 4, 6, 8, 10, 11, 12, HEADER_WORDS)
)
_COLUMNS: Final = 128
_ROWS: Final = 128


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """N rows that decode, on the device; one of padding has `kv_len` 0 and slots of -1.

    token_ids  [N] int64, the token to be computed next
    kv_len     [N] int32, slots that are filled once it has been
    slots      [G, N] int64, per group where its KV goes
    tables     [G, N, W] int32, per group the blocks of each row
    sampling   how to choose the token behind it; has the positions
    """

    token_ids: Tensor
    kv_len: Tensor
    slots: Tensor
    tables: Tensor
    sampling: SamplingRows


def patch_rows(records: Tensor, rows: DecodeRows, block_size: int) -> None:
    """Write records `[n, HEADER_WORDS + G * w]` int32, contiguous, to the rows that they name."""
    num_groups, num_rows, width = rows.tables.shape
    used, rest = divmod(records.shape[1] - HEADER_WORDS, num_groups)
    assert rest == 0, (records.shape, num_groups)
    assert used <= width, (records.shape, rows.tables.shape)
    assert records.is_contiguous(), records.stride()
    how = rows.sampling
    _patch[(len(records),)](
        records, rows.token_ids, rows.kv_len, rows.slots, rows.tables, how.temperature, how.min_p,
        how.top_p, how.top_k, how.seeds, how.positions, records.shape[1], used, num_rows, width,
        BLOCK_SIZE=block_size, GROUPS=num_groups, COLUMNS=_COLUMNS, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def advance_rows(sampled: Tensor, rows: DecodeRows, block_size: int) -> None:
    """Go one token on in the first rows, as many as `sampled` has; padding stays as it is.

    A row whose next block is not in its table must be patched before it is computed.
    """
    num_groups, num_rows, width = rows.tables.shape
    _advance[(triton.cdiv(len(sampled), _ROWS),)](
        sampled, rows.token_ids, rows.kv_len, rows.slots, rows.tables, rows.sampling.positions,
        len(sampled), num_rows, width, BLOCK_SIZE=block_size, GROUPS=num_groups, ROWS=_ROWS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _patch(
    records: Pointer, token_ids: Pointer, kv_len: Pointer, slots: Pointer, tables: Pointer,
    temperature: Pointer, min_p: Pointer, top_p: Pointer, top_k: Pointer, seeds: Pointer,
    positions: Pointer, record_words: Size, used: Size, num_rows: Size, width: Size,
    BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    record = records + tl.program_id(0).to(tl.int64) * record_words
    row, length = tl.load(record + _ROW).to(tl.int64), tl.load(record + _KV_LEN)
    position = _wide(record + _POSITION)
    tl.store(kv_len + row, length)
    tl.store(token_ids + row, _wide(record + _TOKEN))
    tl.store(positions + row, position)
    tl.store(seeds + row, _wide(record + _SEED))
    tl.store(top_p + row, _wide(record + _TOP_P).to(tl.float64, bitcast=True))
    tl.store(temperature + row, tl.load(record + _TEMPERATURE).to(tl.float32, bitcast=True))
    tl.store(min_p + row, tl.load(record + _MIN_P).to(tl.float32, bitcast=True))
    tl.store(top_k + row, tl.load(record + _TOP_K))
    for group in tl.static_range(GROUPS):
        blocks = record + _HEADER + group * used
        table = tables + (group * num_rows + row) * width
        for first in range(0, used, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            block = tl.load(blocks + column, mask=column < used, other=0)
            tl.store(table + column, block, mask=column < used)
        slot = tl.full([], -1, tl.int64)
        if length > 0:
            block = tl.load(blocks + position // BLOCK_SIZE).to(tl.int64)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slots + group * num_rows + row, slot)


@triton.jit
def _wide(place: Pointer) -> Tile:
    """Return the 64 bits at an even word of a record, as a whole number."""
    low, high = tl.load(place), tl.load(place + 1)
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _advance(
    sampled: Pointer, token_ids: Pointer, kv_len: Pointer, slots: Pointer, tables: Pointer,
    positions: Pointer, num_sampled: Size, num_rows: Size, width: Size,
    BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_sampled
    length = tl.load(kv_len + row, mask=is_row, other=0)
    is_live = is_row & (length > 0)
    position = tl.load(positions + row, mask=is_live, other=0) + 1
    tl.store(token_ids + row, tl.load(sampled + row, mask=is_live, other=0), mask=is_live)
    tl.store(positions + row, position, mask=is_live)
    tl.store(kv_len + row, length + 1, mask=is_live)
    column = position // BLOCK_SIZE
    has_block = is_live & (column < width)
    for group in tl.static_range(GROUPS):
        place = (group * num_rows + row).to(tl.int64)
        block = tl.load(tables + place * width + column, mask=has_block, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slots + place, slot, mask=has_block)
