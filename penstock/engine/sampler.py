"""Turns logits into tokens. Which worker samples, and in which batch, makes no difference.

Owns the meaning of sampling parameters. A draw takes one uniform number, an integer hash of the
request's seed and the token's position, through the inverse of the cumulative distribution in order
of token ids; nothing is kept between steps, and no row looks at another. The executor calls it.

Order of operations: minimum length, bias, penalties, temperature, min-p, top-k, top-p. Tokens as
likely as the last one that a filter keeps are kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from penstock.core.step import Sampled, SampleRow, TokenLogprobs

if TYPE_CHECKING:
    from penstock.core.request import SamplingParams

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_CANDIDATES: Final = 1024
"""Top-p sorts this many tokens first, and all of them only if those do not suffice."""


def sample(
    logits: Float32, rows: Sequence[SampleRow], eos_token_ids: tuple[int, ...]
) -> tuple[Sampled, ...]:
    """Choose a token for each row of `logits` `[R, vocab_size]`, which is left as it is."""
    if all(_is_plain(row.params) for row in rows):
        tokens = logits.argmax(1)
    else:
        adjusted = _adjust(logits, rows, eos_token_ids)
        tokens = adjusted.argmax(1)
        drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
        if drawn:
            tokens[drawn] = _draw(adjusted[drawn], [rows[index] for index in drawn])
    chosen = logits[np.arange(len(rows)), tokens]
    assert not np.isnan(chosen).any(), "the model computed NaN"
    return tuple(
        Sampled(token, _logprobs(values, token, row.params.logprobs))
        for token, values, row in zip(tokens.tolist(), logits, rows, strict=True)
    )


def uniform(seeds: Uint64, positions: Uint64) -> Float64:
    """Return a number in [0, 1) for every seed and position, the same on every machine.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied to the seed and then to
    the seed's hash and the position.
    """
    mixed = _mix(_mix(seeds + _GOLDEN) ^ (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: Uint64) -> Uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def is_plain_draw(row: SampleRow) -> bool:
    """Return whether temperature, min-p, top-k and top-p are all that a token depends on."""
    params = row.params
    return not (
        params.logprobs is not None
        or params.logit_bias
        or params.has_penalties
        or row.position - row.prompt_tokens < params.min_tokens
    )


def _is_plain(params: SamplingParams) -> bool:
    """Return whether the arg max of the raw logits is all that is wanted."""
    return (
        params.temperature == 0.0
        and params.logprobs is None
        and not params.min_tokens
        and not params.logit_bias
        and not params.has_penalties
    )


def _adjust(logits: Float32, rows: Sequence[SampleRow], eos_token_ids: tuple[int, ...]) -> Float32:
    """Return logits with minimum length, bias and penalties applied: a copy if any row has some."""
    adjusted = logits
    for index, row in enumerate(rows):
        params = row.params
        is_too_short = row.position - row.prompt_tokens < params.min_tokens
        if not (is_too_short or params.logit_bias or params.has_penalties):
            continue
        if adjusted is logits:
            adjusted = logits.copy()
        values = adjusted[index]
        if is_too_short:
            ends = () if params.ignore_eos else eos_token_ids
            values[[*ends, *params.stop_token_ids]] = -np.inf
        for token, bias in params.logit_bias:
            values[token] += bias
        if params.has_penalties:
            _penalise(values, row)
    return adjusted


def _penalise(values: Float32, row: SampleRow) -> None:
    """Make tokens less likely that are there already, in place.

    Repetition counts prompt and output; presence and frequency count the output alone.
    """
    params = row.params
    token_ids = np.array(row.token_ids, np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(token_ids)
        before = values[seen]
        factor = np.float32(params.repetition_penalty)
        values[seen] = np.where(before > 0, before / factor, before * factor)
    counts = np.bincount(token_ids[row.prompt_tokens :], minlength=len(values))
    output = counts.nonzero()[0]
    values[output] -= np.float32(params.frequency_penalty) * counts[output].astype(np.float32)
    values[output] -= np.float32(params.presence_penalty)


def _draw(logits: Float32, rows: Sequence[SampleRow]) -> Int64:
    """Draw a token for each row."""
    params = [row.params for row in rows]
    temperature = np.array([p.temperature for p in params], np.float32)[:, None]
    # The largest logit becomes 0 first, so that no temperature overflows.
    weights = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    min_p = np.array([p.min_p for p in params], np.float32)
    if min_p.any():
        weights[weights < min_p[:, None]] = 0.0
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if filtered:
        kept = weights[filtered]
        kept[kept < _thresholds(kept, [params[i] for i in filtered])[:, None]] = 0.0
        weights[filtered] = kept
    cumulative = weights.cumsum(1, dtype=np.float64)
    total = cumulative[:, -1]
    target = np.minimum(_uniforms(rows) * total, np.nextafter(total, 0.0))
    tokens: Int64 = (cumulative > target[:, None]).argmax(1)
    return tokens


def _uniforms(rows: Sequence[SampleRow]) -> Float64:
    seeds = []
    for row in rows:
        assert row.params.seed is not None, "the front end gives every request a seed"
        seeds.append(row.params.seed & _MASK)
    positions = [row.position for row in rows]
    return uniform(np.array(seeds, np.uint64), np.array(positions, np.uint64))


def _thresholds(weights: Float32, params: Sequence[SamplingParams]) -> Float32:
    """Return for each row the smallest weight `[N]` that its top-k and top-p keep."""
    vocab_size = weights.shape[1]
    top_k = np.array([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])
    top_p = np.array([p.top_p for p in params])
    has_k = top_k < vocab_size
    count = max(_CANDIDATES, int(top_k[has_k].max(initial=0)))
    thresholds, is_found = _among_best(weights, top_k, top_p, has_k, min(count, vocab_size))
    if not is_found.all():
        rest = ~is_found
        thresholds[rest], _ = _among_best(
            weights[rest], top_k[rest], top_p[rest], has_k[rest], vocab_size
        )
    return thresholds


def _among_best(
    weights: Float32, top_k: Int64, top_p: Float64, has_k: npt.NDArray[np.bool_], count: int
) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Look for the thresholds among each row's `count` largest weights; say where that sufficed."""
    best = weights
    if count < weights.shape[1]:
        best = np.partition(weights, -count, axis=1)[:, -count:]
    best = np.sort(best, axis=1)[:, ::-1]
    cumulative = best.cumsum(1, dtype=np.float64)
    rows = np.arange(len(weights))
    last = np.minimum(top_k, count) - 1
    total = np.where(has_k, cumulative[rows, last], weights.cumsum(1, dtype=np.float64)[:, -1])
    reached = cumulative >= (top_p * total)[:, None]
    is_found = reached[:, -1] | has_k | (count == weights.shape[1])
    # Rounding may leave a sum over all just short of the total: then nothing is filtered out.
    first = np.where(reached[:, -1], reached.argmax(1), last)
    return best[rows, np.minimum(first, last)], is_found


def _logprobs(values: Float32, token: int, num_top: int | None) -> TokenLogprobs | None:
    """Return log probabilities of raw logits `[vocab_size]`, ties in order of token ids."""
    if num_top is None:
        return None
    wide = values.astype(np.float64)
    largest = wide.max()
    normaliser = largest + np.log(np.exp(wide - largest).sum())
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        least = np.partition(values, -num_top)[-num_top] if num_top < len(values) else -np.inf
        candidates = (values >= least).nonzero()[0]
        order = np.argsort(-values[candidates], kind="stable")[:num_top]
        top = tuple((int(i), float(wide[i] - normaliser)) for i in candidates[order])
    return TokenLogprobs(float(wide[token] - normaliser), top)
