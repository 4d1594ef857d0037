"""Digests of blocks on the device: xxh3 with 64 bits, the ones that `penstock/transfer/digest.py`
takes on a CPU.

xxh3 takes 1024 bytes at a time: 16 stripes of 8 words are mixed with a secret and added up, and
then the 8 sums are scrambled into what came before. Sums need nothing of one another, so the first
kernel makes them of all pieces at once, at the speed of memory. The scrambles of a block depend on
each other, so the second walks over its sums, a sixteenth of the block, with all blocks beside one
another.

Source: XXH3 (Yann Collet), as `doc/xxhash_spec.md` of Cyan4973/xxHash specifies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES: Final = 1024
SHORT_BYTES: Final = 240
"""Up to so many bytes xxh3 is another function."""
_PIECES: Final = 8
_ROWS: Final = 8
_UNROLL = tl.constexpr(8)
_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32_1 = tl.constexpr(0x9E3779B1)
_PRIME64_1 = tl.constexpr(0x9E3779B185EBCA87)
_AVALANCHE = tl.constexpr(0x165667919E3779F9)
_BEGINNING: Final = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip
_WORDS = tl.constexpr(24)
"""The secret in words; behind them in the table the words for last stripe, end and beginning."""


@dataclass(frozen=True, slots=True, eq=False)
class DigestSpace:
    """Constants and workspace on the device, for up to N blocks at a time.

    table  [48] int64
    sums   [N, pieces, 8] int64, contiguous
    """

    table: Tensor
    sums: Tensor


def digest_space(blocks: Tensor, num_blocks_max: int) -> DigestSpace:
    """Return what `digest_blocks` needs for blocks like these, on their device."""
    words = [int.from_bytes(_SECRET[i : i + 8], "little") for i in range(0, 192, 8)]
    words += [int.from_bytes(_SECRET[121 + i : 129 + i], "little") for i in range(0, 64, 8)]
    words += [int.from_bytes(_SECRET[11 + i : 19 + i], "little") for i in range(0, 64, 8)]
    signed = [word - (word >> 63 << 64) for word in (*words, *_BEGINNING)]
    size = num_blocks_max, num_pieces(blocks.shape[1]) + 1, 8
    return DigestSpace(
        torch.tensor(signed, dtype=torch.int64, device=blocks.device),
        torch.empty(size, dtype=torch.int64, device=blocks.device),
    )


def num_pieces(block_bytes: int) -> int:
    """Return how many pieces of a block are scrambled; at least a byte is left for the end."""
    assert block_bytes > SHORT_BYTES, block_bytes
    assert block_bytes % 8 == 0, block_bytes
    return (block_bytes - 1) // PIECE_BYTES


def digest_blocks(blocks: Tensor, block_ids: Tensor, space: DigestSpace, digests: Tensor) -> None:
    """Write the digest of block `block_ids[i]` to `digests[i]`.

    `blocks` is `[num_blocks, block_bytes]` uint8, contiguous, whole words to a block and more than
    `SHORT_BYTES`; `block_ids` and `digests` are `[n]` int64, a digest's bits being those of the
    unsigned number.
    """
    n, block_bytes = len(block_ids), blocks.shape[1]
    pieces = num_pieces(block_bytes)
    assert blocks.is_contiguous(), blocks.stride()
    assert blocks.data_ptr() % 8 == 0, blocks.data_ptr()
    assert space.sums.shape[1:] == (pieces + 1, 8), (space.sums.shape, pieces)
    assert n <= len(space.sums), (n, space.sums.shape)
    assert n <= len(digests), (n, digests.shape)
    if n == 0:
        return
    words = blocks.view(torch.int64)
    _sum_pieces[triton.cdiv(pieces + 1, _PIECES), n](
        words, block_ids, space.table, space.sums, BLOCK_BYTES=block_bytes, PIECES=_PIECES,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _scramble[(triton.cdiv(n, _ROWS),)](
        words, block_ids, space.table, space.sums, digests, n, BLOCK_BYTES=block_bytes,
        ROWS=_ROWS, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _sum_pieces(
    words: Pointer, block_ids: Pointer, table: Pointer, sums: Pointer,
    BLOCK_BYTES: tl.constexpr, PIECES: tl.constexpr,
) -> None:  # fmt: skip
    """Add up the stripes of some pieces of a block, of the last one those before its end."""
    NUM_PIECES: tl.constexpr = (BLOCK_BYTES - 1) // 1024
    NUM_STRIPES: tl.constexpr = (BLOCK_BYTES - 1) // 64
    row = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids + row)
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    stripe, pair, side = tl.arange(0, 16), tl.arange(0, 4), tl.arange(0, 2)
    in_stripe = 2 * pair[:, None] + side[None, :]
    number = 16 * piece[:, None] + stripe[None, :]
    places = 8 * number[:, :, None, None] + in_stripe[None, None, :, :]
    is_stripe = (number < NUM_STRIPES)[:, :, None, None]
    data = tl.load(words + block * (BLOCK_BYTES // 8) + places, mask=is_stripe, other=0)
    secret = tl.load(table + stripe[:, None, None] + in_stripe[None, :, :])
    # What is masked must add nothing: its key is taken for zero as well.
    key = data ^ tl.where(is_stripe, secret[None, :, :, :], 0)
    first, second = _mixed(data.to(tl.uint64, bitcast=True), key.to(tl.uint64, bitcast=True))
    total = tl.join(tl.sum(first, 1), tl.sum(second, 1)).to(tl.int64, bitcast=True)
    to = sums + (row * (NUM_PIECES + 1) + piece[:, None, None]) * 8 + in_stripe[None, :, :]
    tl.store(to, total, mask=(piece <= NUM_PIECES)[:, None, None])


@triton.jit
def _scramble(
    words: Pointer, block_ids: Pointer, table: Pointer, sums: Pointer, digests: Pointer, n: Size,
    BLOCK_BYTES: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Walk over the sums of some blocks and finish their digests."""
    NUM_PIECES: tl.constexpr = (BLOCK_BYTES - 1) // 1024
    WHOLE: tl.constexpr = NUM_PIECES // _UNROLL * _UNROLL
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    pair, side = tl.arange(0, 4), tl.arange(0, 2)
    lane = (2 * pair[:, None] + side[None, :])[None, :, :]
    first, second = tl.split(_words(tl.load(table + _WORDS + 16 + lane)))
    even_key, odd_key = tl.split(_words(tl.load(table + 16 + lane)))
    zero = tl.zeros([ROWS, 4], tl.uint64)
    first, second = first + zero, second + zero
    at = sums + row.to(tl.int64)[:, None, None] * ((NUM_PIECES + 1) * 8) + lane
    is_lane = is_row[:, None, None]
    for piece in range(0, WHOLE, _UNROLL):
        for step in tl.static_range(_UNROLL):
            even, odd = tl.split(_words(tl.load(at + (piece + step) * 8, mask=is_lane, other=0)))
            first, second = _step(first + even, even_key), _step(second + odd, odd_key)
    for piece in tl.static_range(WHOLE, NUM_PIECES):
        even, odd = tl.split(_words(tl.load(at + piece * 8, mask=is_lane, other=0)))
        first, second = _step(first + even, even_key), _step(second + odd, odd_key)
    even, odd = tl.split(_words(tl.load(at + NUM_PIECES * 8, mask=is_lane, other=0)))
    block = tl.load(block_ids + row, mask=is_row, other=0)
    end = words + (block + 1)[:, None, None] * (BLOCK_BYTES // 8) - 8 + lane
    data = _words(tl.load(end, mask=is_lane, other=0))
    last_first, last_second = _mixed(data, data ^ _words(tl.load(table + _WORDS + lane)))
    first, second = first + even + last_first, second + odd + last_second
    even_key, odd_key = tl.split(_words(tl.load(table + _WORDS + 8 + lane)))
    first, second = first ^ even_key, second ^ odd_key
    folded = (first * second) ^ tl.umulhi(first, second)
    LENGTH: tl.constexpr = _PRIME64_1 * BLOCK_BYTES & 0xFFFFFFFFFFFFFFFF
    found = tl.sum(folded, 1) + LENGTH
    found = (found ^ (found >> 37)) * _AVALANCHE
    found = found ^ (found >> 32)
    tl.store(digests + row, found.to(tl.int64, bitcast=True), mask=is_row)


@triton.jit
def _mixed(data: Tile, key: Tile) -> tuple[Tile, Tile]:
    """Return what the two words of each pair add to the sums of the pair's lanes."""
    product = (key & 0xFFFFFFFF) * (key >> 32)
    first, second = tl.split(product)
    even, odd = tl.split(data)
    # A word goes to its neighbour's lane as it is.
    return first + odd, second + even


@triton.jit
def _step(sums: Tile, key: Tile) -> Tile:
    return (sums ^ (sums >> 47) ^ key) * _PRIME32_1


@triton.jit
def _words(numbers: Tile) -> Tile:
    return numbers.to(tl.uint64, bitcast=True)
