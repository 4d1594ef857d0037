"""What lies between the QKV product and attention, in one pass: head norms, rotary, the KV store.

A program has one head of some rows: of a query it writes the result, of a key or a value it fills
the slot in the pool. Rounded where the reference rounds: after a norm, and after the rotation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from penstock.engine.kernels import HeadsSpec, Norm, NormKind
from penstock.engine.triton.arguments import Pointer, Scalar, Size, Tile

if TYPE_CHECKING:
    from torch import Tensor

_RMS_LLAMA = tl.constexpr(NormKind.RMS_LLAMA.value)
_LAYER = tl.constexpr(NormKind.LAYER.value)
_FEW_ROWS: Final = 64


def store_heads(
    spec: HeadsSpec,
    qkv: Tensor,
    cache: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    query: Tensor,
) -> None:
    """Norm and turn queries and keys; write queries to `query`, keys and values to their slots.

    `qkv` is `[T, (num_heads + 2 * num_kv_heads) * head_dim]` with contiguous rows, `query`
    `[T, num_heads, head_dim]`, contiguous. `cache` is as in `paged_attention`. `positions` and
    `slots` are `[T]` int64; slot -1 writes nothing. Tables and weights of `spec` are on the device.
    """
    shape, norm = spec.attention, spec.query_norm
    key_cache, value_cache = cache
    num_rows, head_dim = qkv.shape[0], shape.head_dim
    assert key_cache.stride() == value_cache.stride(), (key_cache.stride(), value_cache.stride())
    assert qkv.stride(1) == 1, qkv.stride()
    assert query.is_contiguous(), query.stride()
    _check_norms(spec)
    half = head_dim // 2 if spec.rotary is None else spec.rotary.cos.shape[1]
    is_interleaved = spec.rotary is not None and spec.rotary.interleaved
    rows = 4 if num_rows <= _FEW_ROWS else 16
    _store_heads[triton.cdiv(num_rows, rows), shape.num_heads + 2 * shape.num_kv_heads](
        qkv, query, key_cache, value_cache, positions, slots,
        qkv if spec.rotary is None else spec.rotary.cos,
        qkv if spec.rotary is None else spec.rotary.sin,
        *_parameters(norm, qkv), *_parameters(spec.key_norm, qkv),
        0.0 if norm is None else norm.eps, num_rows, qkv.stride(0), *key_cache.stride()[:3],
        NUM_HEADS=shape.num_heads, NUM_KV_HEADS=shape.num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_SIZE=key_cache.shape[1], ROWS=rows, HALF=half, STEP=2 if is_interleaved else 1,
        REST=head_dim - 2 * half, PADDED_HALF=triton.next_power_of_2(half),
        PADDED_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        HAS_ROTARY=spec.rotary is not None, HAS_NORM=norm is not None,
        KIND=0 if norm is None else norm.kind.value, SPANS_HEADS=spec.norm_spans_heads,
        IS_NORM_LAST=spec.norm_after_rotary,
        WEIGHT_HEADS=norm is not None and norm.weight is not None
        and norm.weight.numel() != head_dim,
        HAS_WEIGHT=norm is not None and norm.weight is not None,
        HAS_BIAS=norm is not None and norm.bias is not None,
        num_warps=1 if rows == 4 else 4, enable_fp_fusion=True,
    )  # fmt: skip


def _check_norms(spec: HeadsSpec) -> None:
    """Assert that queries and keys have norms of one kind, and none that no model has."""
    query, key = spec.query_norm, spec.key_norm
    if query is None or key is None:
        assert query is key, spec
        return
    assert (query.kind, query.eps) == (key.kind, key.eps), (query, key)
    assert (query.weight is None) == (key.weight is None), (query, key)
    assert (query.bias is None) == (key.bias is None), (query, key)
    if spec.norm_spans_heads:
        assert query.kind is not NormKind.LAYER, "a norm over all heads is by root mean square"
        assert not spec.norm_after_rotary, "a norm over all heads comes before they are turned"


def _parameters(norm: Norm | None, instead: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, or something else where there are none."""
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return instead if weight is None else weight, instead if bias is None else bias


@triton.jit
def _store_heads(
    qkv: Pointer, query: Pointer, key_cache: Pointer, value_cache: Pointer,
    positions: Pointer, slots: Pointer, cos: Pointer, sin: Pointer,
    query_weight: Pointer, query_bias: Pointer, key_weight: Pointer, key_bias: Pointer,
    eps: Scalar, num_rows: Size, qkv_row: Size,
    cache_block: Size, cache_slot: Size, cache_head: Size,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, KIND: tl.constexpr,
    SPANS_HEADS: tl.constexpr, IS_NORM_LAST: tl.constexpr, WEIGHT_HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    rows = qkv + row[:, None] * qkv_row
    position = tl.load(positions + row, mask=is_row, other=0)
    if head < NUM_HEADS:
        first, second, rest = _turn(
            rows, rows + head * HEAD_DIM, is_row, position, cos, sin, head,
            query_weight, query_bias, eps,
            NUM_HEADS, HEAD_DIM, ROWS, HALF, STEP, REST, PADDED_HALF, PADDED_REST, HAS_ROTARY,
            HAS_NORM, KIND, SPANS_HEADS, IS_NORM_LAST, WEIGHT_HEADS, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
        to = query + row[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        _write(to, is_row, first, second, rest, HALF, STEP, REST, PADDED_HALF, PADDED_REST)
    else:
        slot = tl.load(slots + row, mask=is_row, other=-1)
        is_kept = slot >= 0
        place = slot // BLOCK_SIZE * cache_block + slot % BLOCK_SIZE * cache_slot
        source = rows + head * HEAD_DIM
        if head < NUM_HEADS + NUM_KV_HEADS:
            kv_head = head - NUM_HEADS
            first, second, rest = _turn(
                rows + NUM_HEADS * HEAD_DIM, source, is_kept, position, cos, sin, kv_head,
                key_weight, key_bias, eps,
                NUM_KV_HEADS, HEAD_DIM, ROWS, HALF, STEP, REST, PADDED_HALF, PADDED_REST,
                HAS_ROTARY, HAS_NORM, KIND, SPANS_HEADS, IS_NORM_LAST, WEIGHT_HEADS, HAS_WEIGHT,
                HAS_BIAS,
            )  # fmt: skip
            to = key_cache + place[:, None] + kv_head * cache_head
            _write(to, is_kept, first, second, rest, HALF, STEP, REST, PADDED_HALF, PADDED_REST)
        else:
            kv_head = head - NUM_HEADS - NUM_KV_HEADS
            first, second, rest = _read(
                source, is_kept, HALF, STEP, REST, PADDED_HALF, PADDED_REST
            )  # fmt: skip
            to = value_cache + place[:, None] + kv_head * cache_head
            _write(to, is_kept, first, second, rest, HALF, STEP, REST, PADDED_HALF, PADDED_REST)


@triton.jit
def _read(
    source: Pointer, is_row: Tile, HALF: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr,
    PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Return a head in three parts: the two of each rotated pair, and what is never rotated.

    Element i pairs with i + HALF, or where STEP is 2, 2 i with 2 i + 1.
    """
    pair, beyond = tl.arange(0, PADDED_HALF), tl.arange(0, PADDED_REST)
    is_pair = is_row[:, None] & (pair < HALF)[None, :]
    OTHER: tl.constexpr = HALF if STEP == 1 else 1
    first = tl.load(source + STEP * pair[None, :], mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(source + OTHER + STEP * pair[None, :], mask=is_pair, other=0.0).to(tl.float32)
    rest = first
    if REST > 0:
        is_beyond = is_row[:, None] & (beyond < REST)[None, :]
        rest = tl.load(source + 2 * HALF + beyond[None, :], mask=is_beyond, other=0.0)
        rest = rest.to(tl.float32)
    return first, second, rest


@triton.jit
def _write(
    to: Pointer, is_row: Tile, first: Tile, second: Tile, rest: Tile,
    HALF: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
) -> None:  # fmt: skip
    """Store the parts of a head where `_read` would look for them."""
    pair, beyond = tl.arange(0, PADDED_HALF), tl.arange(0, PADDED_REST)
    is_pair = is_row[:, None] & (pair < HALF)[None, :]
    OTHER: tl.constexpr = HALF if STEP == 1 else 1
    kind = to.dtype.element_ty
    tl.store(to + STEP * pair[None, :], first.to(kind), mask=is_pair)
    tl.store(to + OTHER + STEP * pair[None, :], second.to(kind), mask=is_pair)
    if REST > 0:
        is_beyond = is_row[:, None] & (beyond < REST)[None, :]
        tl.store(to + 2 * HALF + beyond[None, :], rest.to(kind), mask=is_beyond)


@triton.jit
def _turn(
    section: Pointer, source: Pointer, is_row: Tile, position: Tile, cos: Pointer, sin: Pointer,
    head: Tile, weight: Pointer, bias: Pointer, eps: Scalar,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    STEP: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, KIND: tl.constexpr,
    SPANS_HEADS: tl.constexpr, IS_NORM_LAST: tl.constexpr, WEIGHT_HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Return a head's parts, normed and turned, in float32 and rounded as `qkv` is.

    `section` is where the heads of its kind begin, and `head` which of them it is.
    """
    first, second, rest = _read(source, is_row, HALF, STEP, REST, PADDED_HALF, PADDED_REST)
    if WEIGHT_HEADS:
        weight, bias = weight + head * HEAD_DIM, bias + head * HEAD_DIM
    squares, num_elements = tl.zeros([ROWS], tl.float32), HEAD_DIM
    if SPANS_HEADS:
        num_elements = NUM_HEADS * HEAD_DIM
        for other in range(NUM_HEADS):
            at = section + other * HEAD_DIM
            a, b, c = _read(at, is_row, HALF, STEP, REST, PADDED_HALF, PADDED_REST)
            squares += _squares(a, b, c, REST)
    if HAS_NORM and not IS_NORM_LAST:
        first, second, rest = _normalise(
            first, second, rest, squares, num_elements, weight, bias, eps, source, HALF, STEP,
            REST, PADDED_HALF, PADDED_REST, KIND, SPANS_HEADS, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
    if HAS_ROTARY:
        pair = tl.arange(0, PADDED_HALF)[None, :]
        places, is_pair = position[:, None] * HALF + pair, is_row[:, None] & (pair < HALF)
        c = tl.load(cos + places, mask=is_pair, other=0.0)
        s = tl.load(sin + places, mask=is_pair, other=0.0)
        turned, other = first * c - second * s, second * c + first * s
        first, second = _rounded(turned, source), _rounded(other, source)
    if HAS_NORM and IS_NORM_LAST:
        first, second, rest = _normalise(
            first, second, rest, squares, num_elements, weight, bias, eps, source, HALF, STEP,
            REST, PADDED_HALF, PADDED_REST, KIND, SPANS_HEADS, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
    return first, second, rest


@triton.jit
def _normalise(
    first: Tile, second: Tile, rest: Tile, squares: Tile, num_elements: Size,
    weight: Pointer, bias: Pointer, eps: Scalar, like: Pointer,
    HALF: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr, KIND: tl.constexpr, SPANS_HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Return the parts of the norm, rounded; `squares` are given where it spans heads."""
    pair, beyond = tl.arange(0, PADDED_HALF), tl.arange(0, PADDED_REST)
    OTHER: tl.constexpr = HALF if STEP == 1 else 1
    if KIND == _LAYER:
        mean = tl.sum(first, 1) + tl.sum(second, 1)
        if REST > 0:
            mean += tl.sum(rest, 1)
        mean = (mean / num_elements)[:, None]
        # What pads a part is no element.
        first = tl.where((pair < HALF)[None, :], first - mean, 0.0)
        second = tl.where((pair < HALF)[None, :], second - mean, 0.0)
        if REST > 0:
            rest = tl.where((beyond < REST)[None, :], rest - mean, 0.0)
    if not SPANS_HEADS:
        squares = _squares(first, second, rest, REST)
    factor = tl.rsqrt(squares / num_elements + eps)[:, None]
    first = _scale(
        first * factor, weight, bias, STEP * pair, pair < HALF, like, KIND, HAS_WEIGHT, HAS_BIAS
    )  # fmt: skip
    second = _scale(
        second * factor, weight, bias, OTHER + STEP * pair, pair < HALF, like, KIND, HAS_WEIGHT,
        HAS_BIAS,
    )  # fmt: skip
    if REST > 0:
        rest = _scale(
            rest * factor, weight, bias, 2 * HALF + beyond, beyond < REST, like, KIND, HAS_WEIGHT,
            HAS_BIAS,
        )  # fmt: skip
    return first, second, rest


@triton.jit
def _squares(first: Tile, second: Tile, rest: Tile, REST: tl.constexpr) -> Tile:
    """Return the sum of the squares of a head's elements."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if REST > 0:
        squares += tl.sum(rest * rest, 1)
    return squares


@triton.jit
def _scale(
    value: Tile, weight: Pointer, bias: Pointer, places: Tile, is_place: Tile, like: Pointer,
    KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> Tile:  # fmt: skip
    """Return a part of a norm by weight and bias, rounded."""
    if KIND == _RMS_LLAMA:
        value = _rounded(value, like)
    if HAS_WEIGHT:
        w = tl.load(weight + places, mask=is_place, other=0.0)
        value = value * w.to(tl.float32)[None, :]
    if HAS_BIAS:
        b = tl.load(bias + places, mask=is_place, other=0.0)
        value = value + b.to(tl.float32)[None, :]
    return _rounded(value, like)


@triton.jit
def _rounded(value: Tile, like: Pointer) -> Tile:
    """Return what is left of float32 numbers that were stored where `like` points to."""
    return value.to(like.dtype.element_ty).to(tl.float32)
