"""int8 and int4 on the device: low + scale * code, with the bytes of `penstock/codec/affine.py`.

A program has one tile of a plane: up to 32 tokens, whole groups of keys, by up to 128 channels,
whole groups of values. Tokens are taken in pairs, even and odd, because those share a byte of int4.
Divisions are rounded to nearest and nothing is fused, so that a block encoded here is the block
encoded on a CPU, bit for bit; where a group has a number that is none, only that is promised.

Source: Liu et al., KIVI: A tuning-free asymmetric 2bit quantization for KV cache, arXiv 2402.02750.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from penstock.engine.triton.arguments import Pointer, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

_GROUP_MAX: Final = 32
_COLUMNS_MAX: Final = 128
_LARGEST = tl.constexpr(65504.0)


@dataclass(frozen=True, slots=True)
class AffineShape:
    """How the blocks of a pool, `[num_blocks, layers, 2, block_size, heads, head_dim]`, are cut."""

    num_planes: int
    block_size: int
    width: int
    key_group: int
    value_group: int
    bits: int

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block."""
        elements = self.block_size * self.width
        groups = elements // self.key_group + elements // self.value_group
        return self.num_planes // 2 * (4 * groups + 2 * elements * self.bits // 8)

    @property
    def columns(self) -> int:
        """Channels of a tile: they divide a row, and the groups of values divide them."""
        return gcd(self.width, _COLUMNS_MAX)

    @property
    def num_tiles(self) -> int:
        """Tiles of a plane."""
        return self.block_size // self.key_group * (self.width // self.columns)


def affine_shape(pool: Tensor, bits: int) -> AffineShape:
    """Return how a pool's blocks are encoded with so many bits."""
    _, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
    assert bits in (4, 8), bits
    assert pool.is_contiguous(), pool.stride()
    assert head_dim % 16 == block_size % 2 == 0, (head_dim, block_size)
    return AffineShape(
        num_planes=2 * num_layers,
        block_size=block_size,
        width=num_kv_heads * head_dim,
        key_group=gcd(block_size, _GROUP_MAX),
        value_group=gcd(head_dim, _GROUP_MAX),
        bits=bits,
    )


def encode_affine(pool: Tensor, block_ids: Tensor, encoded: Tensor, *, bits: int) -> None:
    """Encode block `block_ids[i]` of a pool into row i of `encoded`.

    `pool` is as `AffineShape` draws it, of float32, bfloat16 or float16, `block_ids` `[n]` int64,
    `encoded` `[n or more, encoded_bytes or more]` uint8 with contiguous rows that begin at even
    addresses. What is behind the bytes of a row stays as it is.
    """
    _launch(_encode, pool, block_ids, encoded, affine_shape(pool, bits))


def decode_affine(encoded: Tensor, pool: Tensor, block_ids: Tensor, *, bits: int) -> None:
    """Decode row i of `encoded` into block `block_ids[i]` of a pool: `encode_affine` says what both
    are.
    """
    _launch(_decode, pool, block_ids, encoded, affine_shape(pool, bits))


def _launch(
    kernel: triton.JITFunction, pool: Tensor, block_ids: Tensor, encoded: Tensor, shape: AffineShape
) -> None:
    num_blocks = len(block_ids)
    assert encoded.shape[0] >= num_blocks, (encoded.shape, num_blocks)
    assert encoded.shape[1] >= shape.encoded_bytes, (encoded.shape, shape)
    assert encoded.stride(1) == 1, encoded.stride()
    assert encoded.data_ptr() % 2 == encoded.stride(0) % 2 == 0, "scales are of 16 bits"
    if num_blocks == 0:
        return
    kernel[num_blocks * shape.num_tiles, shape.num_planes](
        pool, block_ids, encoded, encoded.stride(0),
        NUM_PLANES=shape.num_planes, BLOCK_SIZE=shape.block_size, WIDTH=shape.width,
        KEY_GROUP=shape.key_group, VALUE_GROUP=shape.value_group, COLUMNS=shape.columns,
        BITS=shape.bits, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _encode(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    numbers, lows, codes, token, column = _place(
        pool, block_ids, encoded, encoded_row,
        NUM_PLANES, BLOCK_SIZE, WIDTH, KEY_GROUP, VALUE_GROUP, COLUMNS, BITS,
    )  # fmt: skip
    if tl.program_id(1) % 2 == 0:
        first = lows + token // KEY_GROUP * WIDTH + column
        GROUPS: tl.constexpr = BLOCK_SIZE * WIDTH // KEY_GROUP
        _encode_keys(numbers, first, codes, GROUPS, WIDTH, KEY_GROUP // 2, COLUMNS, BITS)
    else:
        first = lows + token * (WIDTH // VALUE_GROUP) + column // VALUE_GROUP
        _encode_values(
            numbers, first, codes, BLOCK_SIZE * WIDTH // VALUE_GROUP,
            WIDTH, KEY_GROUP // 2, COLUMNS, VALUE_GROUP, BITS,
        )  # fmt: skip


@triton.jit
def _decode(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    numbers, lows, codes, token, column = _place(
        pool, block_ids, encoded, encoded_row,
        NUM_PLANES, BLOCK_SIZE, WIDTH, KEY_GROUP, VALUE_GROUP, COLUMNS, BITS,
    )  # fmt: skip
    if tl.program_id(1) % 2 == 0:
        first = lows + token // KEY_GROUP * WIDTH + column
        GROUPS: tl.constexpr = BLOCK_SIZE * WIDTH // KEY_GROUP
        _decode_keys(numbers, first, codes, GROUPS, WIDTH, KEY_GROUP // 2, COLUMNS, BITS)
    else:
        first = lows + token * (WIDTH // VALUE_GROUP) + column // VALUE_GROUP
        _decode_values(
            numbers, first, codes, BLOCK_SIZE * WIDTH // VALUE_GROUP,
            WIDTH, KEY_GROUP // 2, COLUMNS, VALUE_GROUP, BITS,
        )  # fmt: skip


@triton.jit
def _encode_keys(
    numbers: Pointer, lows: Pointer, codes: Pointer, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Encode a tile whose columns are groups; `lows` is where the group of the first one is."""
    LEVELS: tl.constexpr = 2**BITS - 1
    pair, channel = tl.arange(0, PAIRS)[:, None], tl.arange(0, COLUMNS)
    places = 2 * pair * WIDTH + channel[None, :]
    even = tl.load(numbers + places).to(tl.float32)
    odd = tl.load(numbers + places + WIDTH).to(tl.float32)
    first, second = _rank(even), _rank(odd)
    low, scale = _settle(
        tl.min(tl.minimum(first, second), 0), tl.max(tl.maximum(first, second), 0), LEVELS
    )  # fmt: skip
    tl.store(lows + channel, low)
    tl.store(lows + GROUPS + channel, scale)
    low, inverse = _exactly(low, scale)
    first = _code(even, low[None, :], inverse[None, :], LEVELS)
    second = _code(odd, low[None, :], inverse[None, :], LEVELS)
    _store_pair(codes, pair, channel[None, :], first, second, WIDTH, BITS)


@triton.jit
def _encode_values(
    numbers: Pointer, lows: Pointer, codes: Pointer, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Encode a tile whose rows are several groups each."""
    LEVELS: tl.constexpr = 2**BITS - 1
    ROW_GROUPS: tl.constexpr = WIDTH // VALUE_GROUP
    pair, channels = _value_channels(PAIRS, COLUMNS, VALUE_GROUP)
    places = 2 * pair * WIDTH + channels
    group = lows + 2 * tl.arange(0, PAIRS)[:, None] * ROW_GROUPS
    group += tl.arange(0, COLUMNS // VALUE_GROUP)[None, :]
    even = tl.load(numbers + places).to(tl.float32)
    odd = tl.load(numbers + places + WIDTH).to(tl.float32)
    even = _encode_rows(even, group, GROUPS, LEVELS)
    odd = _encode_rows(odd, group + ROW_GROUPS, GROUPS, LEVELS)
    _store_pair(codes, pair, channels, even, odd, WIDTH, BITS)


@triton.jit
def _encode_rows(
    values: Tile, group: Pointer, GROUPS: tl.constexpr, LEVELS: tl.constexpr
) -> Tile:  # fmt: skip
    """Store low and scale of groups along the last axis; return the codes."""
    rank = _rank(values)
    low, scale = _settle(tl.min(rank, 2), tl.max(rank, 2), LEVELS)
    tl.store(group, low)
    tl.store(group + GROUPS, scale)
    low, inverse = _exactly(low, scale)
    return _code(values, low[:, :, None], inverse[:, :, None], LEVELS)


@triton.jit
def _decode_keys(
    numbers: Pointer, lows: Pointer, codes: Pointer, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    pair, channel = tl.arange(0, PAIRS)[:, None], tl.arange(0, COLUMNS)
    kind = numbers.dtype.element_ty
    low = tl.load(lows + channel).to(tl.float32)[None, :]
    scale = tl.load(lows + GROUPS + channel).to(tl.float32)[None, :]
    even, odd = _load_pair(codes, pair, channel[None, :], WIDTH, BITS)
    places = 2 * pair * WIDTH + channel[None, :]
    tl.store(numbers + places, (low + scale * even).to(kind))
    tl.store(numbers + places + WIDTH, (low + scale * odd).to(kind))


@triton.jit
def _decode_values(
    numbers: Pointer, lows: Pointer, codes: Pointer, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr, BITS: tl.constexpr,
) -> None:  # fmt: skip
    ROW_GROUPS: tl.constexpr = WIDTH // VALUE_GROUP
    pair, channels = _value_channels(PAIRS, COLUMNS, VALUE_GROUP)
    places = 2 * pair * WIDTH + channels
    group = lows + 2 * tl.arange(0, PAIRS)[:, None] * ROW_GROUPS
    group += tl.arange(0, COLUMNS // VALUE_GROUP)[None, :]
    even, odd = _load_pair(codes, pair, channels, WIDTH, BITS)
    _decode_rows(even, group, numbers + places, GROUPS)
    _decode_rows(odd, group + ROW_GROUPS, numbers + places + WIDTH, GROUPS)


@triton.jit
def _decode_rows(codes: Tile, group: Pointer, to: Pointer, GROUPS: tl.constexpr) -> None:
    low = tl.load(group).to(tl.float32)[:, :, None]
    scale = tl.load(group + GROUPS).to(tl.float32)[:, :, None]
    tl.store(to, (low + scale * codes).to(to.dtype.element_ty))


@triton.jit
def _value_channels(
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr
) -> tuple[Tile, Tile]:  # fmt: skip
    """Return pairs of tokens and channels so that groups lie along the last of three axes."""
    some, member = tl.arange(0, COLUMNS // VALUE_GROUP), tl.arange(0, VALUE_GROUP)
    channels = some[:, None] * VALUE_GROUP + member[None, :]
    return tl.arange(0, PAIRS)[:, None, None], channels[None, :, :]


@triton.jit
def _place(
    pool: Pointer, block_ids: Pointer, encoded: Pointer, encoded_row: Size,
    NUM_PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
) -> tuple[Pointer, Pointer, Pointer, Tile, Tile]:  # fmt: skip
    """Return where a program's tile of numbers, its plane's lows and the tile's codes begin, and
    the tile's first token and channel.
    """
    ELEMENTS: tl.constexpr = BLOCK_SIZE * WIDTH
    ROW_TILES: tl.constexpr = WIDTH // COLUMNS
    TILES: tl.constexpr = BLOCK_SIZE // KEY_GROUP * ROW_TILES
    KEY_BYTES: tl.constexpr = 4 * (ELEMENTS // KEY_GROUP) + ELEMENTS * BITS // 8
    VALUE_BYTES: tl.constexpr = 4 * (ELEMENTS // VALUE_GROUP) + ELEMENTS * BITS // 8
    tile, plane = tl.program_id(0) % TILES, tl.program_id(1)
    row = (tl.program_id(0) // TILES).to(tl.int64)
    token, column = tile // ROW_TILES * KEY_GROUP, tile % ROW_TILES * COLUMNS
    block = tl.load(block_ids + row)
    numbers = pool + (block * NUM_PLANES + plane) * ELEMENTS + token * WIDTH + column
    to = encoded + row * encoded_row + plane // 2 * (KEY_BYTES + VALUE_BYTES)
    to += plane % 2 * KEY_BYTES
    groups = tl.where(plane % 2 == 0, ELEMENTS // KEY_GROUP, ELEMENTS // VALUE_GROUP)
    codes = to + 4 * groups + token * BITS // 8 * WIDTH + column
    return numbers, to.to(tl.pointer_type(tl.float16)), codes, token, column


@triton.jit
def _rank(numbers: Tile) -> Tile:
    """Return int32 in the order of the numbers; what is no number is beyond the infinities, where
    the least and the largest of a group show it.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _settle(lowest: Tile, highest: Tile, LEVELS: tl.constexpr) -> tuple[Tile, Tile]:
    """Return low and scale in float16, of groups with these ranks."""
    is_none = (highest > 0x7F800000) | (lowest < -0x7F800001)
    low = (lowest ^ ((lowest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    high = (highest ^ ((highest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    # Adding zero makes one of the two zeros.
    low = tl.minimum(tl.maximum(low, -_LARGEST), _LARGEST) + 0.0
    low = tl.where(is_none, float("nan"), low).to(tl.float16)
    steps = tl.div_rn(high - low.to(tl.float32), LEVELS * 1.0)
    steps = tl.minimum(tl.maximum(steps, 0.0), _LARGEST) + 0.0
    return low, tl.where(is_none, float("nan"), steps).to(tl.float16)


@triton.jit
def _exactly(low: Tile, scale: Tile) -> tuple[Tile, Tile]:
    """Return what to encode with: the low as it was stored, and the inverse of the scale."""
    scale = scale.to(tl.float32)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    return low.to(tl.float32), inverse


@triton.jit
def _code(numbers: Tile, low: Tile, inverse: Tile, LEVELS: tl.constexpr) -> Tile:
    """Return codes, int32; of what is no number 0."""
    place = (numbers - low) * inverse
    place = tl.minimum(tl.where(place > 0.0, place, 0.0), LEVELS * 1.0)
    return (place + 0.5).to(tl.int32)


@triton.jit
def _store_pair(
    codes: Pointer, pair: Tile, channel: Tile, even: Tile, odd: Tile, WIDTH: tl.constexpr,
    BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Store the codes of even and odd tokens: a byte each, or a byte of both."""
    if BITS == 8:
        places = 2 * pair * WIDTH + channel
        tl.store(codes + places, even.to(tl.uint8))
        tl.store(codes + places + WIDTH, odd.to(tl.uint8))
    else:
        tl.store(codes + pair * WIDTH + channel, (even | odd << 4).to(tl.uint8))


@triton.jit
def _load_pair(
    codes: Pointer, pair: Tile, channel: Tile, WIDTH: tl.constexpr, BITS: tl.constexpr
) -> tuple[Tile, Tile]:  # fmt: skip
    """Return the codes of even and odd tokens, as float32."""
    if BITS == 8:
        places = 2 * pair * WIDTH + channel
        even, odd = tl.load(codes + places), tl.load(codes + places + WIDTH)
    else:
        both = tl.load(codes + pair * WIDTH + channel)
        even, odd = both & 15, both >> 4
    return even.to(tl.float32), odd.to(tl.float32)
