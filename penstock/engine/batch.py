"""A step as the tensors that a model reads: a flat row of tokens, and where their KV lies.

Owns the translation from a `Step` (numpy, what the worker decided) to a `Batch` (torch, what
kernels read). Does not know the model or the pools. The executor calls it once per step; the
decoder and the attention back ends read the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.core.step import Int32, Int64, Step


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """T new tokens of S sequences, of which R rows need logits. Every tensor is contiguous.

    token_ids     [T] int64
    positions     [T] int64, the rotary position of each token
    slots         per group [T] int64, block * block_size + offset of its KV; -1 writes nothing
    query_start   [S + 1] int32; sequence i has rows [query_start[i], query_start[i + 1])
    kv_len        [S] int32, slots of each sequence that are filled once this batch has run
    block_tables  per group [S, W] int32; entry j holds slots [j * block_size, (j + 1) * block_size)
    logits_rows   [R] int64
    max_query_len most rows of one sequence; 1 when the batch only decodes
    """

    token_ids: Tensor
    positions: Tensor
    slots: tuple[Tensor, ...]
    query_start: Tensor
    kv_len: Tensor
    block_tables: tuple[Tensor, ...]
    logits_rows: Tensor
    max_query_len: int


def make_batch(step: Step, block_size: int) -> Batch:
    """Translate a step; the tensors share the step's memory where they can."""
    num_new, num_computed = step.num_new, step.num_computed
    num_seqs, num_tokens = len(num_new), len(step.token_ids)
    query_start = np.zeros(num_seqs + 1, np.int32)
    np.cumsum(num_new, out=query_start[1:])
    kv_len = num_computed + num_new
    if num_tokens == num_seqs:
        # Every sequence has one token (most steps): a row is its sequence.
        rows, positions, max_query_len = _arange(num_seqs), num_computed.astype(np.int64), 1
    else:
        rows = np.repeat(_arange(num_seqs), num_new)
        positions = _arange(num_tokens) + (num_computed - query_start[:-1])[rows]
        max_query_len = int(num_new.max())
    block_index, offset = positions // block_size, positions % block_size
    slots = tuple(
        torch.from_numpy(table[rows, block_index].astype(np.int64) * block_size + offset)
        for table in step.block_tables
    )
    samples = np.fromiter((sample.row for sample in step.samples), np.int64, len(step.samples))
    return Batch(
        token_ids=torch.from_numpy(step.token_ids),
        positions=torch.from_numpy(positions),
        slots=slots,
        query_start=torch.from_numpy(query_start),
        kv_len=torch.from_numpy(kv_len),
        block_tables=tuple(torch.from_numpy(_contiguous(table)) for table in step.block_tables),
        logits_rows=torch.from_numpy(query_start[samples + 1].astype(np.int64) - 1),
        max_query_len=max_query_len,
    )


def _arange(count: int) -> Int64:
    return np.arange(count, dtype=np.int64)


def _contiguous(table: Int32) -> Int32:
    return table if table.flags.c_contiguous else np.ascontiguousarray(table)
