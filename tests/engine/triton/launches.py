"""Launches the kernels in the shapes of real models, for `compiling.py`; prints JSON.

A program of its own, since Triton either interprets kernels or compiles them, and decides when it
is imported: `python -m tests.engine.triton.launches`.
"""

import json
import sys

import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.kernels import Activation, HeadsSpec, Norm, NormKind, Rotary
from penstock.engine.triton.activate import activate
from penstock.engine.triton.decode_rows import (
    HEADER_WORDS,
    DecodeRows,
    advance_rows,
    patch_rows,
)
from penstock.engine.triton.heads import store_heads
from penstock.engine.triton.norm import add_norm
from penstock.engine.triton.paged_attention import Sequences, SplitSpace, paged_attention
from penstock.engine.triton.sample import SamplingRows, sample_rows, sample_space
from tests.engine.triton.compiling import Compiler
from tests.engine.triton.move_launches import MOVE_LAUNCHES


def attention(
    max_query_len: int, heads: int, kv_heads: int, head_dim: int, *, splits: int = 1,
    dtype: torch.dtype = torch.bfloat16, window: int = 0, softcap: float = 0.0, sinks: bool = False,
) -> None:  # fmt: skip
    pool = torch.empty(2, 3, 2, 32, kv_heads, head_dim, dtype=dtype)
    query = torch.empty(64, heads, head_dim, dtype=dtype)
    numbers = torch.empty(64, dtype=torch.int32)
    sequences = Sequences(numbers[:33], numbers[:32], numbers.view(2, 32), 64, max_query_len)
    space = None
    if splits > 1:
        parts = torch.empty(splits, 64, heads, head_dim)
        space = SplitSpace(parts, parts[..., 0].contiguous())
    given = torch.empty(heads) if sinks else None
    spec = AttentionSpec(0, 1, heads, kv_heads, head_dim, 0.125, window, softcap, given)
    cache = pool[:, 1, 0], pool[:, 1, 1]
    paged_attention(spec, query, cache, sequences, torch.empty_like(query), splits=space)


def heads(num_rows: int, head_dim: int, rotary_dim: int, *, has_norm: bool) -> None:
    spec = AttentionSpec(0, 1, 32, 8, head_dim, 1.0)
    table = torch.empty(4096, rotary_dim // 2)
    norm = Norm(NormKind.RMS_LLAMA, torch.empty(head_dim), 1e-6) if has_norm else None
    pool = torch.empty(2, 3, 2, 32, 8, head_dim, dtype=torch.bfloat16)
    numbers = torch.empty(num_rows, dtype=torch.int64)
    store_heads(
        HeadsSpec(spec, Rotary(table, table), norm, norm),
        torch.empty(num_rows, 48 * head_dim, dtype=torch.bfloat16), (pool[:, 1, 0], pool[:, 1, 1]),
        numbers, numbers, torch.empty(num_rows, 32, head_dim, dtype=torch.bfloat16),
    )  # fmt: skip


def norm(width: int) -> None:
    x = torch.empty(2, width, dtype=torch.bfloat16)
    add_norm(
        x, x, 1.0, Norm(NormKind.RMS_LLAMA, torch.empty(width), 1e-6), total=x, normed=x
    )  # fmt: skip


def activation(width: int) -> None:
    x = torch.empty(2, 2 * width, dtype=torch.bfloat16)
    activate(x, Activation.SILU, torch.empty(2, width, dtype=torch.bfloat16), gated=True)


def sampling(num_rows: int, vocab_size: int) -> None:
    real = torch.empty(num_rows)
    whole = torch.empty(num_rows, dtype=torch.int64)
    rows = SamplingRows(real, real, real.double(), whole.int(), whole, whole)
    space = sample_space(num_rows, vocab_size, torch.device("cpu"))
    sample_rows(torch.empty(num_rows, vocab_size), rows, space, whole)


def decode_rows(num_rows: int, groups: int) -> None:
    real, whole = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    sampling = SamplingRows(real, real, real.double(), whole.int(), whole, whole)
    tables = torch.empty(groups, num_rows, 1024, dtype=torch.int32)
    slots = torch.empty(groups, num_rows, dtype=torch.int64)
    rows = DecodeRows(whole, whole.int(), slots, tables, sampling)
    patch_rows(torch.empty(3, HEADER_WORDS + groups * 128, dtype=torch.int32), rows, 32)
    advance_rows(whole, rows, 32)


LAUNCHES = {
    "prefill": lambda: attention(2048, 32, 8, 128),
    "prefill, heads of 80": lambda: attention(2048, 32, 32, 80),
    "prefill, window and sinks": lambda: attention(2048, 64, 8, 64, window=128, sinks=True),
    "prefill, soft cap, heads of 256": lambda: attention(2048, 8, 4, 256, softcap=50.0),
    "prefill, few rows": lambda: attention(16, 32, 8, 128),
    "decode": lambda: attention(1, 32, 8, 128),
    "decode, 8 splits": lambda: attention(1, 32, 8, 128, splits=8),
    "decode, float32": lambda: attention(1, 32, 8, 128, dtype=torch.float32, splits=2),
    "heads of many rows": lambda: heads(2048, 128, 128, has_norm=True),
    "heads of few rows": lambda: heads(8, 128, 128, has_norm=False),
    "heads turned in part": lambda: heads(2048, 80, 32, has_norm=False),
    "norm": lambda: norm(4096),
    "norm of an odd width": lambda: norm(2880),
    "activation": lambda: activation(12288),
    "sampling": lambda: sampling(8, 151936),
    "rows that decode": lambda: decode_rows(64, 2),
    **MOVE_LAUNCHES,
}


def main() -> None:
    codes = {}
    with Compiler() as compiler:
        for name, launch in LAUNCHES.items():
            launch()
            codes[name] = compiler.take()
    json.dump(codes, sys.stdout)


if __name__ == "__main__":
    main()
