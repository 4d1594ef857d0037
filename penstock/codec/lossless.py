"""Lossless: the byte with the exponent is entropy-coded, the mantissas, which are noise, are kept.

rANS with 12 bits of probability over 32 lanes of 32-bit states and a stream of 16-bit words; symbol
i belongs to lane i % 32. Encoding runs backwards, so that decoding reads forwards, and a state that
does not end where encoding began shows that bytes are wrong. What would not get smaller is kept as
it is. The format is drawn in the native twin, `native/lossless.cpp`.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; Giesen, Interleaved entropy coders, arXiv
1402.3392.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.codec.method import BlockShape, Bytes, Method
from penstock.core.errors import BlocksCorrupt

_HEADER_BYTES: Final = 8
_LANES: Final = 32
_PROBABILITY_BITS: Final = 12
_TOTAL: Final = 1 << _PROBABILITY_BITS
_LOWEST: Final = 1 << 16
Counts = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint16]


def _encoded_bytes(shape: BlockShape) -> int:
    return _HEADER_BYTES + shape.block_bytes


def _encode(shape: BlockShape, block: Bytes) -> Bytes:
    symbols, rest = _split(shape, block)
    frequencies = _scale(np.bincount(symbols, minlength=256))
    used = np.flatnonzero(frequencies)
    states, words = _encode_symbols(symbols, frequencies)
    content = np.concatenate(
        [
            used.astype(np.uint8),
            frequencies[used].astype(np.uint16).view(np.uint8),
            states.astype(np.uint32).view(np.uint8),
            rest,
            words.view(np.uint8),
        ]
    )
    if len(content) >= shape.block_bytes:
        used, content = used[:0], block
    header = np.array([_HEADER_BYTES + len(content), len(used)], np.uint32)
    return np.concatenate([header.view(np.uint8), content])


def _decode(shape: BlockShape, encoded: Bytes) -> Bytes:
    length, num_symbols = map(int, encoded[:_HEADER_BYTES].view(np.uint32))
    _require(length <= min(len(encoded), _encoded_bytes(shape)) and num_symbols <= 256)
    if num_symbols == 0:
        _require(length == _encoded_bytes(shape))
        return encoded[_HEADER_BYTES:length].copy()
    rest_bytes = shape.num_elements * (shape.element_bytes - 1)
    ends = np.cumsum([_HEADER_BYTES, num_symbols, 2 * num_symbols, 4 * _LANES, rest_bytes]).tolist()
    _require(ends[-1] <= length and (length - ends[-1]) % 2 == 0)
    used, scaled, states, rest = (encoded[start:end].copy() for start, end in pairwise(ends))
    table = _read_table(used, scaled.view(np.uint16).astype(np.int64))
    words = encoded[ends[-1] : length].copy().view(np.uint16)
    lanes = states.view(np.uint32).astype(np.int64)
    return _join(shape, _decode_symbols(table, lanes, words, shape.num_elements), rest)


def _split(shape: BlockShape, block: Bytes) -> tuple[Bytes, Bytes]:
    """Return the bytes with the exponents, and the others.

    Sign and mantissa of bfloat16 and float32 are brought together below the exponent. Of float16
    the upper byte holds the whole exponent anyhow.
    """
    bits = block.view(f"<u{shape.element_bytes}")
    if shape.dtype != "float16":
        bits = bits << 1 | bits >> (8 * shape.element_bytes - 1)
    if shape.element_bytes == 2:
        return (bits >> 8).astype(np.uint8), bits.astype(np.uint8)
    low, middle = bits.astype(np.uint16).view(np.uint8), (bits >> 16).astype(np.uint8)
    return (bits >> 24).astype(np.uint8), np.concatenate([low, middle])


def _join(shape: BlockShape, symbols: Bytes, rest: Bytes) -> Bytes:
    """Undo `_split`."""
    kind, width, n = f"<u{shape.element_bytes}", 8 * shape.element_bytes, len(symbols)
    bits = symbols.astype(kind) << (width - 8)
    if shape.element_bytes == 2:
        bits |= rest
    else:
        bits |= rest[: 2 * n].view(np.uint16) | rest[2 * n :].astype(kind) << 16
    if shape.dtype != "float16":
        bits = bits >> 1 | bits << (width - 1)
    return bits.astype(kind).view(np.uint8)


def _scale(counts: Counts) -> Counts:
    """Scale counts so that they add up to `_TOTAL` and none that occurs is 0."""
    scaled = np.where(counts, np.maximum(counts * _TOTAL // counts.sum(), 1), 0)
    while excess := int(scaled.sum()) - _TOTAL:
        most = int(scaled.argmax())
        scaled[most] -= min(excess, int(scaled[most]) // 2)
    return scaled


def _encode_symbols(symbols: Bytes, frequencies: Counts) -> tuple[Counts, Words]:
    """Return the lanes' last states and the words in the order of reading."""
    starts = np.cumsum(frequencies) - frequencies
    states, words = np.full(_LANES, _LOWEST, np.int64), []
    for first in range((len(symbols) - 1) // _LANES * _LANES, -1, -_LANES):
        some = symbols[first : first + _LANES]
        frequency, state = frequencies[some], states[: len(some)]
        is_full = state >> 20 >= frequency
        words.append((state[is_full] & 0xFFFF).astype(np.uint16))
        state = np.where(is_full, state >> 16, state)
        quotient = state // frequency
        states[: len(some)] = state + starts[some] + quotient * (_TOTAL - frequency)
    return states, np.concatenate([*words[::-1], np.empty(0, np.uint16)])


def _read_table(used: Bytes, scaled: Counts) -> Counts:
    """Return for every slot its symbol, frequency and distance from its start, [3, _TOTAL]."""
    _require(int(scaled.min()) > 0 and int(scaled.sum()) == _TOTAL)
    starts = np.cumsum(scaled) - scaled
    offsets = np.arange(_TOTAL) - starts.repeat(scaled)
    return np.stack([used.astype(np.int64).repeat(scaled), scaled.repeat(scaled), offsets])


def _decode_symbols(table: Counts, states: Counts, words: Words, num_symbols: int) -> Bytes:
    symbols, num_read = np.empty(num_symbols, np.uint8), 0
    for first in range(0, num_symbols, _LANES):
        count = min(_LANES, num_symbols - first)
        state = states[:count]
        symbol, frequency, offset = table[:, state % _TOTAL]
        symbols[first : first + count] = symbol
        state = frequency * (state >> _PROBABILITY_BITS) + offset
        is_low = np.flatnonzero(state < _LOWEST)
        _require(num_read + len(is_low) <= len(words))
        state[is_low] = state[is_low] << 16 | words[num_read : num_read + len(is_low)]
        num_read += len(is_low)
        states[:count] = state
    _require(num_read == len(words) and bool((states == _LOWEST).all()))
    return symbols


def _require(is_sound: bool) -> None:
    if not is_sound:
        raise BlocksCorrupt("these bytes are no losslessly encoded block")


LOSSLESS = Method("lossless", True, _encoded_bytes, _encode, _decode)
