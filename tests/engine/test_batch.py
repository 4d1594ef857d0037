"""A step's rows, slots and starts, against a count by hand."""

import random

import numpy as np
import torch

from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.engine.batch import make_batch

BLOCK_SIZE = 16


def make_step(
    new: list[int], computed: list[int], tables: list[np.ndarray], rows: list[int]
) -> Step:
    samples = tuple(SampleRow(row, SamplingParams(), 1, 1, []) for row in rows)
    return Step(
        0,
        np.arange(sum(new), dtype=np.int64) + 100,
        np.array(new, np.int32),
        np.array(computed, np.int32),
        tuple(tables),
        samples,
    )


def check(step: Step) -> None:
    batch = make_batch(step, BLOCK_SIZE)
    positions, slots, starts = [], [[] for _ in step.block_tables], [0]
    for row, (new, computed) in enumerate(zip(step.num_new, step.num_computed, strict=True)):
        for position in range(computed, computed + new):
            positions.append(position)
            for group, table in enumerate(step.block_tables):
                block = table[row, position // BLOCK_SIZE]
                slots[group].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(starts[-1] + new)
    assert batch.token_ids.tolist() == step.token_ids.tolist()
    assert batch.positions.tolist() == positions
    assert [group.tolist() for group in batch.slots] == slots
    assert batch.query_start.tolist() == starts
    assert batch.kv_len.tolist() == (step.num_new + step.num_computed).tolist()
    assert batch.logits_rows.tolist() == [starts[sample.row + 1] - 1 for sample in step.samples]
    assert batch.max_query_len == max(step.num_new)
    dtypes = [(torch.int64, [batch.token_ids, batch.positions, *batch.slots, batch.logits_rows])]
    dtypes.append((torch.int32, [batch.query_start, batch.kv_len, *batch.block_tables]))
    for dtype, tensors in dtypes:
        assert all(tensor.dtype is dtype and tensor.is_contiguous() for tensor in tensors)


def test_random_steps() -> None:
    rng = random.Random(0)
    generator = np.random.default_rng(0)
    for _ in range(60):
        num_seqs = rng.randint(1, 9)
        new = [rng.choice([1, 1, 2, 17, 40]) for _ in range(num_seqs)]
        computed = [rng.randint(0, 90) for _ in range(num_seqs)]
        tables = [
            generator.integers(0, 500, (num_seqs, 9), dtype=np.int32)
            for _ in range(rng.randint(1, 3))
        ]
        rows = rng.sample(range(num_seqs), rng.randint(0, num_seqs))
        check(make_step(new, computed, tables, rows))


def test_decode_steps() -> None:
    generator = np.random.default_rng(1)
    tables = [generator.integers(0, 500, (5, 4), dtype=np.int32)]
    check(make_step([1] * 5, [0, 15, 16, 33, 47], tables, [0, 1, 2, 3, 4]))
    check(make_step([1] * 5, [0, 15, 16, 33, 47], tables, [3, 1]))


def test_a_table_with_gaps_between_rows_is_packed() -> None:
    wide = np.arange(40, dtype=np.int32).reshape(4, 10)[:, :3]
    check(make_step([1, 3, 2, 1], [5, 20, 30, 47], [wide], [1]))
