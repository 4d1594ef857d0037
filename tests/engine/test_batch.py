"""A step's rows, slots and starts, against a count by hand; and what a gap in a table computes."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.engine.batch import make_batch
from penstock.engine.loading import load_model

BLOCK_SIZE = 16
FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
NUM_BLOCKS = 8
GAPS = np.array([[0, 1, 2], [0, 4, 1]], np.int32)


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


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(model=str(FOLDER), dtype="float32"), lambda *_: None)


class Masked:
    """The model's kernels, but attention is dense and sees nothing of the gap."""

    def __init__(self, kernels: Any, hidden: list[range]) -> None:
        self.kernels, self.hidden = kernels, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def prepare(self, forward: Any) -> Any:
        return lambda batch: forward(self, batch)

    def attend(self, spec: Any, query: Any, keys: Any, values: Any, batch: Any) -> Any:
        (length,) = batch.kv_len.tolist()
        assert query.shape[0] == 1
        table = batch.block_tables[0][0].long()
        ratio = spec.num_heads // spec.num_kv_heads
        keys = keys[table].flatten(0, 1)[:length].repeat_interleave(ratio, 1)
        values = values[table].flatten(0, 1)[:length].repeat_interleave(ratio, 1)
        scores = torch.einsum("hd,thd->ht", query[0], keys) * spec.scale
        for gap in self.hidden:
            scores[:, gap.start : gap.stop] = float("-inf")
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values)[None]


def step(tokens: list[int], start: int, gaps: np.ndarray | None) -> Step:
    table = np.arange(NUM_BLOCKS, dtype=np.int32)[::-1].copy()
    if gaps is not None:
        for _, first, count in gaps.tolist():
            table[first : first + count] = 0
    return Step(
        step_id=0,
        token_ids=np.array(tokens[start:], np.int64),
        num_new=np.array([len(tokens) - start], np.int32),
        num_computed=np.array([start], np.int32),
        block_tables=(table[None],),
        samples=(SampleRow(0, SamplingParams(), 1, len(tokens), tokens),),
        gaps=gaps,
    )


def test_positions_stay_and_slots_and_length_close_the_gaps():
    batch = make_batch(step(list(range(100)), 99, GAPS), BLOCK_SIZE)
    assert batch.positions.tolist() == [99]
    assert batch.kv_len.tolist() == [100 - 3 * BLOCK_SIZE]
    assert batch.block_tables[0][0, :5].tolist() == [7, 4, 2, 1, 0]
    assert batch.slots[0].tolist() == [1 * BLOCK_SIZE + 99 % BLOCK_SIZE]


def test_decoding_behind_gaps_is_attention_under_that_mask(model):
    layout = model.layout(BLOCK_SIZE)
    inner = (2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
    pool = torch.zeros(NUM_BLOCKS, len(layout.groups[0].layers), *inner)
    tokens = [int(t) for t in np.random.default_rng(3).integers(10, 4000, 100)]
    hidden = [range(first * BLOCK_SIZE, (first + n) * BLOCK_SIZE) for _, first, n in GAPS.tolist()]
    with torch.inference_mode():
        run = model.forward.bind(model.kernels, (pool,))
        run(make_batch(step(tokens[:99], 0, None), BLOCK_SIZE))
        dense = pool.clone()
        full = run(make_batch(step(tokens, 99, None), BLOCK_SIZE))
        windowed = run(make_batch(step(tokens, 99, GAPS), BLOCK_SIZE))
        masked: Any = Masked(model.kernels, hidden)
        oracle = model.forward.bind(masked, (dense,))
        expected = oracle(make_batch(step(tokens, 99, None), BLOCK_SIZE))
    torch.testing.assert_close(windowed, expected, rtol=1e-4, atol=1e-4)
    assert (full - windowed).abs().max() > 1e-2
