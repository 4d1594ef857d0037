"""Launches the kernels in the shapes of real models, for `compiling.py`; prints JSON.

A program of its own, since Triton either interprets kernels or compiles them, and decides when it
is imported: `python -m tests.engine.triton.launches`.
"""

import json
import sys

import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.triton.paged_attention import Sequences, SplitSpace, paged_attention
from tests.engine.triton.compiling import Compiler


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


LAUNCHES = {
    "prefill": lambda: attention(2048, 32, 8, 128),
    "prefill, heads of 80": lambda: attention(2048, 32, 32, 80),
    "prefill, window and sinks": lambda: attention(2048, 64, 8, 64, window=128, sinks=True),
    "prefill, soft cap, heads of 256": lambda: attention(2048, 8, 4, 256, softcap=50.0),
    "prefill, few rows": lambda: attention(16, 32, 8, 128),
    "decode": lambda: attention(1, 32, 8, 128),
    "decode, 8 splits": lambda: attention(1, 32, 8, 128, splits=8),
    "decode, float32": lambda: attention(1, 32, 8, 128, dtype=torch.float32, splits=2),
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
