"""Paged attention by Triton against dense attention in float64, over pools full of NaN."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.triton.paged_attention import (
    SPLITS_MAX,
    Sequences,
    SplitSpace,
    decode_splits,
    paged_attention,
)
from tests.engine.attention_cases import TOLERANCE, Case, make_case


class TritonAttention:
    """Implements `attend` of `AttentionBackend`, with outputs and workspaces full of NaN."""

    name = "triton"

    def __init__(self, device: torch.device, num_splits: int = 1) -> None:
        self.device, self.num_splits = device, num_splits

    def attend(self, spec, query, key_cache, value_cache, batch):
        # Keys and values stay views of one pool.
        pool = key_cache._base.to(self.device)
        cache = tuple(
            torch.as_strided(pool, view.shape, view.stride(), view.storage_offset())
            for view in (key_cache, value_cache)
        )
        if spec.sinks is not None:
            spec = replace(spec, sinks=spec.sinks.to(self.device))
        sequences = Sequences(
            batch.query_start.to(self.device),
            batch.kv_len.to(self.device),
            batch.block_tables[spec.group].to(self.device),
            num_rows=len(query),
            max_query_len=batch.max_query_len,
        )
        query = query.to(self.device)
        output = torch.full_like(query, float("nan"))
        paged_attention(spec, query, cache, sequences, output, splits=self.space(spec, query))
        return output.cpu()

    def space(self, spec: AttentionSpec, query: torch.Tensor) -> SplitSpace | None:
        if self.num_splits == 1:
            return None
        shape = self.num_splits, len(query) + 3, spec.num_heads, spec.head_dim
        parts = torch.full(shape, float("nan"), device=self.device)
        return SplitSpace(parts, torch.full(shape[:3], float("nan"), device=self.device))


def random_case(seed: int, *, decode: bool) -> Case:
    """Draw a batch and a layer, so that shapes come together that nobody thought of."""
    rng = np.random.default_rng(seed)
    num_kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 3, 4, 7, 8]))
    lengths = []
    for _ in range(rng.integers(1, 4)):
        new = 1 if decode else int(rng.integers(1, 50))
        lengths.append((new, new + int(rng.integers(0, 150))))
    return make_case(
        lengths,
        dtype=(torch.float32, torch.bfloat16, torch.float16)[seed % 3],
        seed=seed,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=int(rng.choice([16, 64, 80, 96, 128])),
        block_size=int(rng.choice([16, 32, 64, 128])),
        window=int(rng.choice([0, 1, 17, 64])),
        softcap=float(rng.choice([0.0, 5.0])),
        sinks=bool(rng.integers(2)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_prefill_chunks_and_decode_in_one_batch(device, seed):
    random_case(seed, decode=False).check(TritonAttention(device))


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_decode_whole_and_in_splits(device, seed, num_splits):
    random_case(100 + seed, decode=True).check(TritonAttention(device, num_splits))


@pytest.mark.parametrize("seed", range(3))
def test_prefill_in_splits(device, seed):
    random_case(200 + seed, decode=False).check(TritonAttention(device, 4))


def test_heads_of_256(device):
    case = make_case([(5, 40), (1, 9)], dtype=torch.bfloat16, head_dim=256, block_size=32)
    case.check(TritonAttention(device))


def test_a_tile_of_warp_group_products(device):
    case = make_case([(70, 200)], dtype=torch.bfloat16, num_heads=8, window=50)
    case.check(TritonAttention(device))
    case = make_case([(70, 200)], dtype=torch.bfloat16, num_heads=8)
    case.check(TritonAttention(device))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_reads_nothing_and_becomes_zero(device, num_splits):
    case = make_case([(1, 40), (1, 7)], dtype=torch.float32)
    case.batch.kv_len[1] = 0
    case.batch.block_tables[0][1] = 2**30
    output = TritonAttention(device, num_splits).attend(
        case.spec, case.query, case.key_cache, case.value_cache, case.batch
    )
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert (output[0] - case.expected()[0]).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_splits", [1, 4])
def test_parts_of_a_batch_fill_one_output(device, num_splits):
    """Decoding rows in a call of their own, the chunk behind them in another."""
    case = make_case([(1, 40), (1, 100), (23, 60), (9, 9)], dtype=torch.float32)
    attention = TritonAttention(device, num_splits)
    query, batch = case.query.to(device), case.batch
    cache = case.key_cache.to(device), case.value_cache.to(device)
    output = torch.full_like(query, float("nan"))
    tensors = batch.query_start, batch.kv_len, batch.block_tables[0]
    whole = Sequences(*(tensor.to(device) for tensor in tensors), len(query), 23)
    for part in (whole.part(0, 2, 2, 1), whole.part(2, 4, 32, 23)):
        space = attention.space(case.spec, query)
        paged_attention(case.spec, query, cache, part, output, splits=space)
    assert (output.cpu().double() - case.expected()).abs().max() < TOLERANCE[torch.float32]


def test_rows_of_no_sequence_stay_as_they_are(device):
    case = make_case([(3, 40), (1, 7)], dtype=torch.float32)
    case.batch.query_start[2] = 3
    output = TritonAttention(device).attend(
        case.spec, case.query, case.key_cache, case.value_cache, case.batch
    )
    assert output[3].isnan().all()
    assert not output[:3].isnan().any()


def test_splits_fill_the_device_and_no_more():
    assert decode_splits(1, 8, 132) == 32
    assert decode_splits(32, 8, 132) == 1
    assert decode_splits(4, 8, 132) == 8
    assert decode_splits(1, 1, 132) == SPLITS_MAX
    assert decode_splits(1024, 8, 132) == 1
