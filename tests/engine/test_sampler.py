"""The sampler against a naive one, and the promise that neither batch nor worker matters."""

import math
import random

import numpy as np
import pytest
import torch

from penstock.core.request import SamplingParams
from penstock.core.step import Sampled, SampleRow
from penstock.engine.sampler import sample, uniform

EOS = (1, 4)


def make_row(
    index: int = 0, position: int = 7, tokens: list[int] | None = None, **params
) -> SampleRow:
    """Return a row whose first three tokens are the prompt."""
    params = {"seed": 11, **params}
    token_ids = tokens if tokens is not None else [3] * position
    return SampleRow(index, SamplingParams(**params), 3, position, token_ids)


def random_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (rows, vocab_size)).astype(np.float32)


def naive_uniform(seed: int, position: int) -> float:
    """Return the uniform number by Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix(mix((seed + golden) % 2**64) ^ ((position + 1) * golden % 2**64)) >> 11) / 2**53


def naive_logits(logits: np.ndarray, row: SampleRow) -> list[float]:
    """Apply minimum length, bias and penalties, a token at a time."""
    p, values = row.params, [float(x) for x in logits]
    output = row.token_ids[row.prompt_tokens :]
    if len(output) < p.min_tokens:
        for token in (*([] if p.ignore_eos else EOS), *p.stop_token_ids):
            values[token] = -math.inf
    for token, bias in p.logit_bias:
        values[token] += bias
    for token in range(len(values)):
        if token in row.token_ids and p.repetition_penalty != 1.0:
            factor = p.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        count = output.count(token)
        values[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    return values


def naive_support(values: list[float], p: SamplingParams) -> dict[int, float]:
    """Return the weights of the tokens that all filters keep."""
    best = max(values)
    weights = {i: math.exp((v - best) / p.temperature) for i, v in enumerate(values)}
    weights = {i: w for i, w in weights.items() if w >= p.min_p and w > 0}
    order = sorted(weights, key=lambda i: -weights[i])
    if p.top_k > 0:
        order = [i for i in order if weights[i] >= weights[order[min(p.top_k, len(order)) - 1]]]
    if p.top_p < 1.0:
        # As elsewhere, top-p counts from the k best, not from tokens that tie with the last.
        counted = order[: p.top_k] if p.top_k > 0 else order
        total, running = sum(weights[i] for i in counted), 0.0
        for last in counted:
            running += weights[last]
            if running >= p.top_p * total:
                break
        order = [i for i in order if weights[i] >= weights[last]]
    return {i: weights[i] for i in order}


def naive_sample(logits: np.ndarray, row: SampleRow) -> int:
    values = naive_logits(logits, row)
    if row.params.is_greedy:
        return values.index(max(values))
    support = naive_support(values, row.params)
    target = naive_uniform(row.params.seed % 2**64, row.position) * sum(support.values())
    running = 0.0
    for token in sorted(support):
        running += support[token]
        if running > target:
            break
    return token


def random_row(rng: random.Random, index: int, vocab_size: int) -> SampleRow:
    """Return a row with any mixture of parameters."""
    position = rng.randint(4, 40)
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.4]),
        top_k=rng.choice([0, 0, 1, 5, 40, 10_000]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.4, -0.3]),
        logit_bias=rng.choice([(), ((5, 3.0), (9, -100.0))]),
        min_tokens=rng.choice([0, 10]),
        stop_token_ids=rng.choice([(), (6,)]),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, 0, 3]),
        seed=rng.randint(-(2**62), 2**62),
    )
    tokens = [rng.randrange(vocab_size) for _ in range(position)]
    return SampleRow(index, params, rng.randint(1, 3), position, tokens)


@pytest.mark.parametrize(("vocab_size", "seed"), [(17, 0), (50, 1), (300, 2), (3000, 3)])
def test_any_mixture_of_parameters_equals_the_naive_sampler(vocab_size: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [random_row(rng, index, vocab_size) for index in range(60)]
    logits = random_logits(60, vocab_size, seed)
    wanted = [naive_sample(values, row) for values, row in zip(logits, rows, strict=True)]
    assert [result.token_id for result in sample(logits, rows, EOS)] == wanted


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_flat_nucleus_larger_than_the_first_candidates(spread: float) -> None:
    logits = random_logits(8, 6000, 5, spread)
    rows = [make_row(i, temperature=1.0, top_p=0.95, seed=i) for i in range(8)]
    wanted = [naive_sample(values, row) for values, row in zip(logits, rows, strict=True)]
    assert [result.token_id for result in sample(logits, rows, EOS)] == wanted


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = random.Random(7)
    rows = [random_row(rng, index, 2000) for index in range(50)]
    logits = random_logits(50, 2000, 9)
    together = sample(logits, rows, EOS)
    for index, row in enumerate(rows):
        assert sample(logits[index : index + 1], [row], EOS) == (together[index],)
    order = list(range(50))
    rng.shuffle(order)
    shuffled = sample(logits[order], [rows[i] for i in order], EOS)
    assert shuffled == tuple(together[i] for i in order)


def test_draws_follow_the_distribution() -> None:
    logits = random_logits(1, 12, 3, 1.0)
    draws = 20_000
    rows = [make_row(position=position, tokens=[], temperature=1.0) for position in range(draws)]
    tokens = [r.token_id for r in sample(np.repeat(logits, draws, 0), rows, EOS)]
    expected = torch.softmax(torch.from_numpy(logits[0]).double(), 0).numpy() * draws
    chi_square = ((np.bincount(tokens, minlength=12) - expected) ** 2 / expected).sum()
    # 11 degrees of freedom: 31.3 is exceeded once in a thousand.
    assert chi_square < 31.3


def test_seeds_are_independent_of_each_other() -> None:
    seeds = np.arange(20_000, dtype=np.uint64)
    numbers = uniform(seeds, np.full(20_000, 5, np.uint64))
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, one in a thousand
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    later = uniform(seeds, np.full(20_000, 6, np.uint64))
    assert abs(np.corrcoef(numbers, later)[0, 1]) < 0.03


def test_the_hash_never_changes() -> None:
    # Workers of different versions must draw alike: a change here breaks a request in flight.
    numbers = uniform(np.array([0, 1, 2**64 - 1], np.uint64), np.array([0, 9, 10**6], np.uint64))
    assert numbers.tolist() == [
        naive_uniform(0, 0),
        naive_uniform(1, 9),
        naive_uniform(2**64 - 1, 10**6),
    ]
    assert numbers.tolist() == [0.01403302919427496, 0.270277066224342, 0.5459469862693368]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.zeros((2, 40), np.float32)
    logits[0, [7, 30]] = 1.0
    rows = [make_row(0, temperature=0.0), make_row(1, temperature=0.0, logprobs=2)]
    first, second = sample(logits, rows, EOS)
    assert first == Sampled(7)
    assert second.token_id == 0
    assert [token for token, _ in second.logprobs.top] == [0, 1]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3, 100, 4)
    rows = [
        make_row(0, temperature=0.0, logprobs=5, logit_bias=((50, 100.0),)),
        make_row(1, temperature=0.5, top_k=3, logprobs=0),
        make_row(2, temperature=1.0, logprobs=200),
    ]
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    results = sample(logits, rows, EOS)
    assert results[0].token_id == 50
    for result, expected, count in zip(results, wanted, (5, 0, 100), strict=True):
        assert result.logprobs.logprob == pytest.approx(float(expected[result.token_id]))
        values, ids = expected.topk(count)
        assert [token for token, _ in result.logprobs.top] == ids.tolist()
        assert [value for _, value in result.logprobs.top] == pytest.approx(values.tolist())


def test_min_tokens_counts_output_and_then_lets_go() -> None:
    logits = random_logits(1, 30, 6)
    logits[0, EOS[0]] = 50.0
    logits[0, 8] = 40.0
    params = {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": (8,)}
    early = make_row(position=6, **params)  # three prompt tokens, three of output
    late = make_row(position=7, **params)
    assert sample(logits, [early], EOS)[0].token_id not in {*EOS, 8}
    assert sample(logits, [late], EOS)[0].token_id == EOS[0]
    deaf = make_row(position=6, ignore_eos=True, **params)
    assert sample(logits, [deaf], EOS)[0].token_id == EOS[0]


def test_presence_and_frequency_leave_the_prompt_alone() -> None:
    logits = np.zeros((1, 10), np.float32)
    logits[0, [2, 5]] = [3.0, 2.5]
    tokens = [2, 2, 2, 9, 9]
    row = make_row(position=5, tokens=tokens, temperature=0.0, presence_penalty=2.0)
    assert sample(logits, [row], EOS)[0].token_id == 2
    row = make_row(position=5, tokens=[0, 1, 3, 2, 9], temperature=0.0, presence_penalty=2.0)
    assert sample(logits, [row], EOS)[0].token_id == 5
    row = make_row(position=5, tokens=tokens, temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, [row], EOS)[0].token_id == 5


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(4, 50, 8)
    before = logits.copy()
    rng = random.Random(1)
    sample(logits, [random_row(rng, index, 50) for index in range(4)], EOS)
    assert np.array_equal(logits, before)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(5, 200, 2)
    rows = [make_row(i, temperature=1e-6, seed=i) for i in range(5)]
    assert [r.token_id for r in sample(logits, rows, EOS)] == logits.argmax(1).tolist()


def test_nan_is_a_bug_and_not_a_token() -> None:
    logits = random_logits(1, 20)
    logits[0, 3] = np.nan
    with pytest.raises(AssertionError, match="NaN"):
        sample(logits, [make_row(temperature=0.0)], EOS)
