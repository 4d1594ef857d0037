"""The executor behind which no model runs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.request import SamplingParams
from penstock.core.step import Sampled, SampleRow, Step
from penstock.runtime.instant import InstantExecutor, instant_layout


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 20))
def test_tokens_are_of_the_vocabulary_and_end_nothing(seed: int, position: int):
    executor = InstantExecutor(100, avoided=(0, 98, 99))
    token_id = executor.token_at(seed, position)
    assert 0 < token_id < 98
    assert token_id == InstantExecutor(100, avoided=(0, 98, 99)).token_at(seed, position)


def test_tokens_differ_by_seed_and_position():
    executor = InstantExecutor(1 << 30)
    tokens = {executor.token_at(seed, position) for seed in range(50) for position in range(50)}
    assert len(tokens) == 2500


def test_each_sample_of_a_step_gets_its_token():
    executor = InstantExecutor(1000)
    samples = tuple(
        SampleRow(row, SamplingParams(seed=row + 5), 1, 7 + row, [1, 2]) for row in range(3)
    )
    ones = np.ones(3, np.int32)
    tables = (np.zeros((3, 1), np.int32),)
    step = Step(1, np.zeros(3, np.int64), ones, ones, tables, samples)
    expected = tuple(Sampled(executor.token_at(row + 5, 7 + row)) for row in range(3))
    assert executor.execute(step) == expected


def test_the_layout_is_small_and_moves_like_any_other():
    layout = instant_layout(32)
    assert layout.token_bytes == 16
    assert layout.block_bytes == (512,)
