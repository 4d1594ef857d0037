"""Batches of random sequences in pools full of NaN, and what dense attention in float64 makes of
them. For the tests of every attention back end.
"""

from dataclasses import dataclass

import numpy as np
import torch

from penstock.engine.attention import AttentionBackend, AttentionSpec
from penstock.engine.batch import Batch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """Sequences with their keys and values, in a pool whose every other slot is NaN."""

    spec: AttentionSpec
    batch: Batch
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def expected(self) -> torch.Tensor:
        parts = []
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = slice(*self.batch.query_start[i : i + 2].tolist())
            parts.append(dense_attention(self.spec, self.query[rows], keys, values))
        return torch.cat(parts)

    def check(self, backend: AttentionBackend) -> None:
        output = backend.attend(self.spec, self.query, self.key_cache, self.value_cache, self.batch)
        assert output.dtype == self.query.dtype
        assert output.shape == self.query.shape
        error = (output.double() - self.expected()).abs().max().item()
        assert error < TOLERANCE[self.query.dtype], (error, self.spec)


def dense_attention(spec, query, keys, values):
    """Compute one sequence in float64, the obvious way."""
    n, t, ratio = len(query), len(keys), spec.num_heads // spec.num_kv_heads
    keys, values = (x.double().repeat_interleave(ratio, 1) for x in (keys, values))
    scores = torch.einsum("nhd,thd->hnt", query.double(), keys) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(t - n, t)[:, None]
    slot = torch.arange(t)[None]
    visible = (slot <= position) & ((slot > position - spec.window) | (spec.window == 0))
    scores = scores.masked_fill(~visible, float("-inf"))
    if spec.sinks is not None:
        scores = torch.cat([scores, spec.sinks.double()[:, None, None].expand(-1, n, 1)], -1)
    weights = scores.softmax(-1)[..., :t]
    return torch.einsum("hnt,thd->nhd", weights, values)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> Case:
    """Make a batch of sequences, each given as (new tokens, tokens in all), in random blocks."""
    rng = torch.Generator().manual_seed(seed)
    starts = np.cumsum([0, *(new for new, _ in lengths)])
    widths = [-(-total // block_size) for _, total in lengths]
    num_blocks = sum(widths) + 3
    order = torch.randperm(num_blocks, generator=rng).int()
    shape = (num_blocks, 3, 2, block_size, num_kv_heads, head_dim)
    pool = torch.full(shape, float("nan"), dtype=dtype)
    key_cache, value_cache = pool[:, 1, 0], pool[:, 1, 1]
    # A table's unused entries must not be followed.
    tables = torch.full((len(lengths), max(widths) + 2), 2**30, dtype=torch.int32)
    keys, values, used = [], [], 0
    for i, (new, total) in enumerate(lengths):
        blocks = order[used : used + widths[i]]
        used += widths[i]
        tables[i, : widths[i]] = blocks
        k, v = (
            torch.randn(total, num_kv_heads, head_dim, generator=rng).to(dtype) for _ in range(2)
        )
        oldest = max(0, total - new - window + 1) if window else 0
        tables[i, : oldest // block_size] = 2**30
        for slot in range(oldest, total):
            block = blocks[slot // block_size]
            key_cache[block, slot % block_size] = k[slot]
            value_cache[block, slot % block_size] = v[slot]
        keys.append(k)
        values.append(v)
    num_rows = int(starts[-1])
    # Queries lie in a wider row, as they do behind a fused QKV product.
    wide = torch.randn(num_rows, num_heads * head_dim + 48, generator=rng).to(dtype)
    batch = Batch(
        token_ids=torch.zeros(num_rows, dtype=torch.int64),
        positions=torch.zeros(num_rows, dtype=torch.int64),
        slots=(torch.full((num_rows,), -1),),
        query_start=torch.from_numpy(starts.astype(np.int32)),
        kv_len=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_tables=(tables,),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        max_query_len=max(new for new, _ in lengths),
    )
    spec = AttentionSpec(
        0, 1, num_heads, num_kv_heads, head_dim, head_dim**-0.5, window, softcap,
        torch.randn(num_heads, generator=rng) if sinks else None,
    )  # fmt: skip
    query = wide[:, 48:].view(num_rows, num_heads, head_dim)
    return Case(spec, batch, query, key_cache, value_cache, keys, values)
