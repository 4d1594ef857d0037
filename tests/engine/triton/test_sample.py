"""Sampling by Triton chooses the very tokens that the CPU sampler does."""

import numpy as np
import pytest
import torch

from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow
from penstock.engine.sampler import sample
from penstock.engine.triton.sample import SamplingRows, sample_rows, sample_space

VOCAB_SIZE = 5000


def rows_of(params: list[SamplingParams], positions: list[int], device) -> SamplingRows:
    def column(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingRows(
        temperature=column([p.temperature for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        top_p=column([p.top_p for p in params], torch.float64),
        top_k=column([max(0, p.top_k) for p in params], torch.int32),
        seeds=torch.from_numpy(
            np.array([p.seed & (1 << 64) - 1 for p in params], np.uint64).view(np.int64)
        ).to(device),
        # Of the query: one before that of the token.
        positions=column([position - 1 for position in positions], torch.int64),
    )


def draw(logits: np.ndarray, params: list[SamplingParams], positions: list[int], device):
    num_rows, vocab_size = logits.shape
    space = sample_space(num_rows, vocab_size, device)
    tokens = torch.full((num_rows,), -7, device=device)
    sample_rows(
        torch.from_numpy(logits).to(device), rows_of(params, positions, device), space, tokens
    )
    return tokens.tolist()


def law(logits: np.ndarray, params: list[SamplingParams], positions: list[int]) -> list[int]:
    rows = [
        SampleRow(i, p, 1, position, [])
        for i, (p, position) in enumerate(zip(params, positions, strict=True))
    ]
    return [sampled.token_id for sampled in sample(logits, rows, ())]


FILTERS = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "greedy": {"temperature": 0.0},
    "min-p": {"min_p": 0.2},
    "top-k": {"top_k": 7},
    "top-1": {"top_k": 1},
    "top-p": {"top_p": 0.8},
    "all of it": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
    "more than there are": {"top_k": VOCAB_SIZE + 1},
    "more than min-p leaves": {"top_k": 3000, "min_p": 0.3},
}


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_those_of_the_law(device, name):
    rng = np.random.default_rng(len(name))
    num_rows = 6
    logits = (2 * rng.standard_normal((num_rows, VOCAB_SIZE))).astype(np.float32)
    seeds = [0, -1, 2**63, 12345678901234567890, 5, 6]
    params = [SamplingParams(seed=seed, **FILTERS[name]) for seed in seeds]
    positions = rng.integers(1, 1 << 40, num_rows).tolist()
    assert draw(logits, params, positions, device) == law(logits, params, positions)


def test_rows_with_different_wishes_go_together(device):
    rng = np.random.default_rng(0)
    params = [SamplingParams(seed=index, **values) for index, values in enumerate(FILTERS.values())]
    logits = rng.standard_normal((len(params), VOCAB_SIZE)).astype(np.float32)
    positions = list(range(1, len(params) + 1))
    assert draw(logits, params, positions, device) == law(logits, params, positions)


def test_ties_are_kept_and_the_first_of_equals_is_greedy(device):
    logits = np.zeros((8, 300), np.float32)
    logits[:, 50:250:3] = 2.0
    params = [SamplingParams(seed=seed, top_k=3, top_p=0.9) for seed in range(7)]
    params.append(SamplingParams(temperature=0.0, seed=0))
    found = draw(logits, params, list(range(8)), device)
    assert found == law(logits, params, list(range(8)))
    assert found[-1] == 50
    assert len(set(found)) > 3


def test_the_ends_of_the_distribution_are_reached(device):
    # All weight on a token at the very end, in a chunk of its own.
    logits = np.full((2, 8193), -np.inf, np.float32)
    logits[0, 8192], logits[1, 0] = 1.0, 1.0
    params = [SamplingParams(seed=3), SamplingParams(seed=4)]
    assert draw(logits, params, [9, 9], device) == [8192, 0]


def test_what_is_no_number_is_told(device):
    logits = np.zeros((3, 6000), np.float32)
    logits[0, 5000], logits[1, 3] = np.nan, np.nan
    params = [SamplingParams(temperature=float(seed > 0), seed=seed) for seed in range(3)]
    found = draw(logits, params, [1, 2, 3], device)
    assert found[:2] == [-1, -1]
    assert found[2] == law(logits[2:], params[2:], [3])[0]
