"""Head norms, rotary and the KV store by Triton against the torch reference."""

from dataclasses import replace

import pytest
import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.batch import Batch
from penstock.engine.kernels import HeadsSpec, Norm, NormKind, Rotary
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.triton.heads import store_heads
from tests.engine.triton.test_norm import close, on

BLOCK_SIZE = 16


def make_rotary(dim: int, *, interleaved: bool = False) -> Rotary:
    angles = torch.arange(100)[:, None] * 0.5 ** torch.arange(dim // 2)[None]
    return Rotary(1.1 * angles.cos(), 1.1 * angles.sin(), interleaved)


def make_norm(kind: NormKind, width: int, *, has_bias: bool = False) -> Norm:
    bias = torch.randn(width) if has_bias else None
    return Norm(kind, 1 + 0.3 * torch.randn(width), 1e-5, bias)


def per_head(kind: NormKind, **options) -> dict[str, Norm]:
    norms = [make_norm(kind, heads * 32, **options) for heads in (4, 2)]
    return {"query_norm": norms[0], "key_norm": norms[1]}


def shared(kind: NormKind) -> dict[str, Norm]:
    return {"query_norm": make_norm(kind, 32), "key_norm": make_norm(kind, 32)}


CASES = {
    "rotary": lambda: {"rotary": make_rotary(32)},
    "partial rotary": lambda: {"rotary": make_rotary(12)},
    "interleaved": lambda: {"rotary": make_rotary(32, interleaved=True)},
    "partial interleaved": lambda: {"rotary": make_rotary(16, interleaved=True)},
    "nothing": dict,
    "norm": lambda: {"rotary": make_rotary(32), **shared(NormKind.RMS_LLAMA)},
    "norm of Gemma": lambda: {"rotary": make_rotary(32), **shared(NormKind.RMS)},
    "norm, partial rotary": lambda: {"rotary": make_rotary(12), **shared(NormKind.RMS_LLAMA)},
    "norm without rotary": lambda: shared(NormKind.RMS),
    "norm per head": lambda: {"rotary": make_rotary(32), **per_head(NormKind.LAYER)},
    "norm with bias": lambda: {
        "rotary": make_rotary(12),
        **per_head(NormKind.LAYER, has_bias=True),
    },
    "norm over heads": lambda: {
        "rotary": make_rotary(32), "norm_spans_heads": True, **per_head(NormKind.RMS_LLAMA),
    },
    "norm after rotary": lambda: {
        "rotary": make_rotary(32), "norm_after_rotary": True, **shared(NormKind.RMS_LLAMA),
    },
}  # fmt: skip


def run(device, options, dtype, num_rows, head_dim=32) -> None:
    """Compare what one call returns and what it leaves in the pool."""
    spec = HeadsSpec(AttentionSpec(0, 1, 4, 2, head_dim, 1.0), **options)
    positions, slots = torch.randint(0, 100, (num_rows,)), torch.randperm(7 * BLOCK_SIZE)[:num_rows]
    slots[1::5] = -1
    empty = torch.zeros(0, dtype=torch.int64)
    batch = Batch(empty, positions, (slots,), empty, empty, (empty,), empty, num_rows)
    qkv = torch.randn(num_rows, 8 * head_dim + 16).to(dtype)[:, : 8 * head_dim]
    pool = torch.randn(7, 3, 2, BLOCK_SIZE, 2, head_dim).to(dtype)
    ours = pool.clone().to(device)
    expected = ReferenceKernels().heads(spec, qkv.contiguous(), pool[:, 1, 0], pool[:, 1, 1], batch)
    query = torch.full((num_rows, 4, head_dim), float("nan"), dtype=dtype, device=device)
    tables = spec.rotary and Rotary(
        spec.rotary.cos.to(device), spec.rotary.sin.to(device), spec.rotary.interleaved
    )
    norms = (norm and on(device, norm) for norm in (spec.query_norm, spec.key_norm))
    there = replace(
        spec, rotary=tables, **dict(zip(("query_norm", "key_norm"), norms, strict=True))
    )
    store_heads(
        there, qkv.to(device), (ours[:, 1, 0], ours[:, 1, 1]), positions.to(device),
        slots.to(device), query,
    )  # fmt: skip
    close(query, expected)
    close(ours, pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_heads(device, dtype, name):
    torch.manual_seed(len(name))
    run(device, CASES[name](), dtype, 9)


@pytest.mark.parametrize("head_dim", [80, 128])
def test_heads_of_other_sizes(device, head_dim):
    torch.manual_seed(head_dim)
    norms = {name: make_norm(NormKind.RMS_LLAMA, head_dim) for name in ("query_norm", "key_norm")}
    run(device, {"rotary": make_rotary(head_dim), **norms}, torch.float16, 6, head_dim)


def test_many_rows(device):
    torch.manual_seed(3)
    run(device, CASES["norm, partial rotary"](), torch.bfloat16, 70)
