"""What is recorded of attention: its mass by block, whose it is, and lines for the simulator."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.engine.attention import AttentionSpec
from penstock.engine.executor import ModelExecutor
from penstock.engine.kv_access import AccessLog, RecordedExecutor, block_mass
from penstock.engine.loading import load_model
from penstock.sim.accesses import read_accesses

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 16


def test_mass_is_that_of_a_dense_softmax_and_ends_at_the_window():
    torch.manual_seed(0)
    cache = torch.randn(6, 4, 2, 16)
    query, table = torch.randn(4, 16), torch.tensor([5, 1, 3], dtype=torch.int32)
    spec = AttentionSpec(0, 0, 4, 2, 16, 0.25)
    mass = block_mass(spec, query, cache, table, 10)
    keys = cache[[5, 1, 3]].flatten(0, 1)[:10]
    for head in range(2):
        weights = (query[2 * head : 2 * head + 2] @ keys[:, head].T * 0.25).softmax(-1).mean(0)
        expected = torch.stack([weights[:4].sum(), weights[4:8].sum(), weights[8:].sum()])
        torch.testing.assert_close(mass[head], expected)
    windowed = block_mass(AttentionSpec(0, 0, 4, 2, 16, 0.25, window=3), query, cache, table, 10)
    assert (windowed[:, 0] == 0).all()
    torch.testing.assert_close(windowed.sum(-1), torch.ones(2))


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(model=str(FOLDER), dtype="float32"), lambda *_: None)


def decode(model, num_steps: int, accesses: AccessLog | None) -> list[int]:
    """Prefill 40 tokens, then decode greedily."""
    layout = model.layout(BLOCK_SIZE)
    inner = (2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
    pool = torch.zeros(8, len(layout.groups[0].layers), *inner)
    executor = (
        ModelExecutor(model, (pool,))
        if accesses is None
        else RecordedExecutor(model, (pool,), accesses)
    )
    tokens = list(range(100, 140))
    for number in range(num_steps + 1):
        start = 0 if not number else len(tokens) - 1
        sample = SampleRow(0, SamplingParams(temperature=0.0), 40, len(tokens), tokens)
        step = Step(
            step_id=number,
            token_ids=np.array(tokens[start:], np.int64),
            num_new=np.array([len(tokens) - start], np.int32),
            num_computed=np.array([start], np.int32),
            block_tables=(np.array([[3, 0, 6, 2]], np.int32),),
            samples=(sample,),
        )
        (sampled,) = executor.execute(step)
        tokens.append(sampled.token_id)
    return tokens


def test_recording_changes_no_token_and_is_what_the_simulator_reads(model, tmp_path: Path):
    path = tmp_path / "accesses.jsonl"
    accesses = AccessLog(path)
    assert decode(model, 3, accesses) == decode(model, 3, None)
    accesses.close()
    layout = model.layout(BLOCK_SIZE)
    num_layers = len(layout.groups[0].layers)
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header == {"block_bytes": 2 * BLOCK_SIZE * layout.head_dim * 4}
    # Three steps decode; the prefill before them is none.
    assert len(lines) == 3 * num_layers * layout.num_kv_heads
    assert {line["step"] for line in lines} == {1, 2, 3}
    assert {line["request"] for line in lines} == {"r0"}
    for line in lines:
        assert line["mass"] == sorted(line["mass"], reverse=True)
        assert 0.99 < sum(line["mass"]) <= 1.001
        assert set(line["blocks"]) <= {0, 1, 2}
    everything, half = read_accesses(path), read_accesses(path, mass=0.5)
    assert everything.block_bytes == header["block_bytes"]
    assert len(everything.units) == 3 * num_layers
    assert len(lines) <= half.num_accesses < everything.num_accesses


def test_a_new_sequence_in_the_place_of_an_old_one_has_a_new_name(tmp_path: Path):
    accesses = AccessLog(tmp_path / "a.jsonl")
    tokens = [1] * 30

    def names(*positions: int) -> list[str | None]:
        found = []
        for position in positions:
            row = SampleRow(0, SamplingParams(), 5, position, tokens)
            one = np.array([1], np.int32)
            accesses.begin(Step(0, np.array([1]), one, one, (np.zeros((1, 1), np.int32),), (row,)))
            found.append(accesses.request(0))
        return found

    assert names(10, 11, 12) == ["r0"] * 3
    assert names(7, 8) == ["r1"] * 2
    assert accesses.request(1) is None
    accesses.close()
