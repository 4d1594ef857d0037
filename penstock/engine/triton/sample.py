"""Chooses tokens on the device, as `penstock/engine/sampler.py` does: that file is the law.

A row's uniform number is the same hash of seed and position, and goes through the inverse of the
cumulative distribution in order of token ids. Temperature, min-p, top-k and top-p are here; bias,
penalties, minimum length and log probabilities are not. Sums are in float64 as there, so a token
can differ only where the number falls within a rounding of float32 of a boundary.

A row is cut into chunks, so that few rows fill the device as well. Top-k and top-p look for the
smallest weight that is kept by bisection over the bits of a float32, which is exact and keeps ties,
and skip chunks whose largest weight is below what is tried.
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

CHUNK: Final = 4096
_ONE_BITS = tl.constexpr(0x3F800000)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """How to choose for each of R rows; tensors `[R]` on the device.

    temperature float32, 0 is greedy; min_p float32; top_p float64, 1 is off; top_k int32, 0 is
    off; seeds int64, the bits of an unsigned number; positions int64, of the query: the token that
    is chosen comes one behind it.
    """

    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    seeds: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SampleSpace:
    """Workspace for up to R rows of V logits, in C chunks: see `sample_space`.

    largest [R, C] float32, first [R, C] int32 (where it is), sums [R, C] float64, threshold [R]
    float32.
    """

    largest: Tensor
    first: Tensor
    sums: Tensor
    threshold: Tensor


def sample_space(num_rows: int, vocab_size: int, device: torch.device) -> SampleSpace:
    """Return workspace for `sample_rows`."""
    shape = num_rows, triton.cdiv(vocab_size, CHUNK)
    return SampleSpace(
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )


def sample_rows(logits: Tensor, rows: SamplingRows, space: SampleSpace, tokens: Tensor) -> None:
    """Write a token for each row of `logits` `[R, V]` float32 to `tokens` `[R]` int64.

    A row with a NaN gets -1. Rows are contiguous.
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.stride(1) == 1, logits.stride()
    assert len(space.threshold) >= num_rows, (space.threshold.shape, num_rows)
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    shape = {
        "CHUNK": CHUNK, "NUM_CHUNKS": num_chunks, "PADDED": triton.next_power_of_2(num_chunks),
        "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    each, all_chunks = (num_rows,), (num_rows, num_chunks)
    _survey[all_chunks](
        logits, space.largest, space.first, vocab_size, logits.stride(0), **shape
    )  # fmt: skip
    _find_threshold[each](
        logits, space.largest, rows.temperature, rows.min_p, rows.top_p, rows.top_k,
        space.threshold, vocab_size, logits.stride(0), **shape,
    )  # fmt: skip
    _sum_chunks[all_chunks](
        logits, space.largest, rows.temperature, space.threshold, space.sums, vocab_size,
        logits.stride(0), **shape,
    )  # fmt: skip
    _choose[each](
        logits, space.largest, space.first, space.sums, rows.temperature, space.threshold,
        rows.seeds, rows.positions, tokens, vocab_size, logits.stride(0), **shape,
    )  # fmt: skip


@triton.jit
def _survey(
    logits: Pointer, largest: Pointer, first: Pointer, vocab_size: Size, logits_row: Size,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Note each chunk's largest logit, and where it is first; infinity and -1 for one with NaN."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * logits_row + place, mask=place < vocab_size, other=float("-inf"))
    is_number = tl.min((x == x).to(tl.int32), 0) == 1
    top = tl.max(x, 0)
    where = tl.min(tl.where(x == top, place, vocab_size), 0)
    to = row * NUM_CHUNKS + chunk
    tl.store(largest + to, tl.where(is_number, top, float("inf")))
    tl.store(first + to, tl.where(is_number, where, -1).to(tl.int32))


@triton.jit
def _row_max(largest: Pointer, row: Tile, NUM_CHUNKS: tl.constexpr, PADDED: tl.constexpr) -> Tile:
    chunk = tl.arange(0, PADDED)
    at = largest + row * NUM_CHUNKS + chunk
    return tl.max(tl.load(at, mask=chunk < NUM_CHUNKS, other=float("-inf")), 0)


@triton.jit
def _weights(
    logits: Pointer, chunk: Tile, vocab_size: Size, top: Tile, temperature: Tile, least: Tile,
    CHUNK: tl.constexpr,
) -> Tile:  # fmt: skip
    """Return the weights of a chunk, those below `least` as 0; the largest of a row is 1."""
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + place, mask=place < vocab_size, other=float("-inf"))
    weights = tl.exp(tl.div_rn(x - top, temperature))
    return tl.where(weights >= least, weights, 0.0)


@triton.jit
def _above(
    logits: Pointer, largest: Pointer, vocab_size: Size, top: Tile, temperature: Tile, least: Tile,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr,
) -> tuple[Tile, Tile]:  # fmt: skip
    """Return how many weights of a row are `least` or more, and their sum."""
    count, mass = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float64)
    for chunk in range(NUM_CHUNKS):
        best = tl.exp(tl.div_rn(tl.load(largest + chunk) - top, temperature))
        # The same number as in `_weights`, but for a rounding: hence the margin.
        if best * 1.0001 >= least:
            weights = _weights(logits, chunk, vocab_size, top, temperature, least, CHUNK)
            count += tl.sum((weights > 0.0).to(tl.int32), 0)
            mass += tl.sum(weights.to(tl.float64), 0)
    return count, mass


@triton.jit
def _find_threshold(
    logits: Pointer, largest: Pointer, temperature: Pointer, min_p: Pointer, top_p: Pointer,
    top_k: Pointer, threshold: Pointer, vocab_size: Size, logits_row: Size,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Note the smallest weight that is kept: by min-p, then among the top k, then by top-p."""
    row = tl.program_id(0).to(tl.int64)
    heat, least = tl.load(temperature + row), tl.load(min_p + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    has_k = (k > 0) & (k < vocab_size)
    if (heat > 0.0) & (has_k | (p < 1.0)):
        x, chunks = logits + row * logits_row, largest + row * NUM_CHUNKS
        top = _row_max(largest, row, NUM_CHUNKS, PADDED)
        count, total = _above(x, chunks, vocab_size, top, heat, least, CHUNK, NUM_CHUNKS)
        # Weights of 0 count among the k as well, but add nothing and are not kept.
        if has_k & (k < count):
            bits = tl.full([], 0, tl.int32)
            for step in range(30):
                trial = bits | (1 << (29 - step))
                bound = tl.maximum(trial.to(tl.float32, bitcast=True), least)
                count, _ = _above(x, chunks, vocab_size, top, heat, bound, CHUNK, NUM_CHUNKS)
                bits = tl.where((trial <= _ONE_BITS) & (count >= k), trial, bits)
            kth = bits.to(tl.float32, bitcast=True)
            least = tl.maximum(least, kth)
            # Of those as likely as the last, as many belong to the sum as make it k.
            above = (bits + 1).to(tl.float32, bitcast=True)
            count, mass = _above(x, chunks, vocab_size, top, heat, above, CHUNK, NUM_CHUNKS)
            total = mass + (k - count).to(tl.float64) * kth.to(tl.float64)
        if p < 1.0:
            bits = tl.full([], 0, tl.int32)
            for step in range(30):
                trial = bits | (1 << (29 - step))
                bound = tl.maximum(trial.to(tl.float32, bitcast=True), least)
                _, mass = _above(x, chunks, vocab_size, top, heat, bound, CHUNK, NUM_CHUNKS)
                bits = tl.where((trial <= _ONE_BITS) & (mass >= p * total), trial, bits)
            least = tl.maximum(least, bits.to(tl.float32, bitcast=True))
    tl.store(threshold + row, least)


@triton.jit
def _sum_chunks(
    logits: Pointer, largest: Pointer, temperature: Pointer, threshold: Pointer, sums: Pointer,
    vocab_size: Size, logits_row: Size,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Note the sum of the weights that each chunk keeps."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, least = tl.load(temperature + row), tl.load(threshold + row)
    if heat > 0.0:
        top = _row_max(largest, row, NUM_CHUNKS, PADDED)
        x = logits + row * logits_row
        weights = _weights(x, chunk, vocab_size, top, heat, least, CHUNK)
        tl.store(sums + row * NUM_CHUNKS + chunk, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def _choose(
    logits: Pointer, largest: Pointer, first: Pointer, sums: Pointer, temperature: Pointer,
    threshold: Pointer, seeds: Pointer, positions: Pointer, tokens: Pointer,
    vocab_size: Size, logits_row: Size,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Store the most likely token, or the one at which the sum of weights passes the number."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    is_chunk = chunk < NUM_CHUNKS
    heat, least = tl.load(temperature + row), tl.load(threshold + row)
    at = row * NUM_CHUNKS + chunk
    best = tl.load(largest + at, mask=is_chunk, other=float("-inf"))
    top = tl.max(best, 0)
    # The first chunk with the largest logit has its first place; one with NaN goes before all.
    winner = tl.min(tl.where(best == top, chunk, PADDED), 0)
    token = tl.load(first + row * NUM_CHUNKS + winner).to(tl.int64)
    if (heat > 0.0) & (token >= 0):
        kept = tl.load(sums + at, mask=is_chunk, other=0.0)
        reached = tl.cumsum(kept, 0)
        total = tl.max(reached, 0)
        number = _uniform(tl.load(seeds + row), tl.load(positions + row) + 1)
        # No more than the number just below the total, so that some sum is above it.
        below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
        target = tl.minimum(number * total, below)
        own = tl.min(tl.where((reached > target) & is_chunk, chunk, NUM_CHUNKS - 1), 0)
        before = tl.sum(tl.where(chunk == own, reached - kept, 0.0), 0)
        x = logits + row * logits_row
        weights = _weights(x, own, vocab_size, top, heat, least, CHUNK)
        inner = tl.cumsum(weights.to(tl.float64), 0) + before
        place = tl.arange(0, CHUNK)
        found = tl.min(tl.where((inner > target) & (weights > 0.0), place, CHUNK), 0)
        # Sums in another order may fall short of the chunk's by a rounding: then it is the last.
        last = tl.max(tl.where(weights > 0.0, place, 0), 0)
        token = (own * CHUNK + tl.where(found < CHUNK, found, last)).to(tl.int64)
    tl.store(tokens + row, token)


@triton.jit
def _uniform(seed: Tile, position: Tile) -> Tile:
    """Return the number in [0, 1) of `penstock.engine.sampler.uniform`."""
    hashed = _mix(seed.to(tl.uint64, bitcast=True) + _GOLDEN)
    mixed = _mix(hashed ^ ((position + 1).to(tl.uint64, bitcast=True) * _GOLDEN))
    return (mixed >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mix(x: Tile) -> Tile:
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
