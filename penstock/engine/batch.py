"""A step as the tensors that a model reads: a flat row of tokens, and where their KV lies.

Owns the translation from a `Step` (numpy, what the worker decided) to a `Batch` (torch, what
kernels read). Does not know the model or the pools. The executor calls it once per step; the
decoder and the attention back ends read the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import from_numpy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from penstock.core.step import Int32, Step


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """T new tokens of S sequences, of which R rows need logits. Every tensor is contiguous.

    token_ids     [T] int64
    positions     [T] int64, the rotary position of each token
    slots         per group [T] int64, block * block_size + offset of its KV; -1 writes nothing
    query_start   [S + 1] int32; sequence i has rows [query_start[i], query_start[i + 1])
    kv_len        [S] int32, slots of each sequence that are filled once this batch has run; fewer
                  than its tokens where blocks were let go of in the middle
    block_tables  per group [S, W] int32; entry j holds slots [j * block_size, (j + 1) * block_size)
    logits_rows   [R] int64
    max_query_len most rows of one sequence; 1 when the batch only decodes
    num_decodes   so many sequences at the beginning have one row each
    """

    token_ids: Tensor
    positions: Tensor
    slots: tuple[Tensor, ...]
    query_start: Tensor
    kv_len: Tensor
    block_tables: tuple[Tensor, ...]
    logits_rows: Tensor
    max_query_len: int
    num_decodes: int = 0

    def tensors(self) -> list[Tensor]:
        """Return every tensor, in the order of `with_tensors`."""
        first = [self.token_ids, self.positions, self.query_start, self.kv_len, self.logits_rows]
        return [*first, *self.slots, *self.block_tables]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """Return the same batch with other tensors, as many as `tensors` returns."""
        token_ids, positions, query_start, kv_len, logits_rows, *groups = tensors
        return replace(
            self,
            token_ids=token_ids,
            positions=positions,
            slots=tuple(groups[: len(self.slots)]),
            query_start=query_start,
            kv_len=kv_len,
            block_tables=tuple(groups[len(self.slots) :]),
            logits_rows=logits_rows,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, what is not there yet copied."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors()])


def make_batch(step: Step, block_size: int) -> Batch:
    """Translate a step; the tensors share the step's memory where they can."""
    num_new, num_computed = step.num_new, step.num_computed
    num_seqs, num_tokens = len(num_new), len(step.token_ids)
    rows = np.arange(num_seqs)
    logits_rows = np.array([sample.row for sample in step.samples], np.int64)
    if num_tokens == num_seqs:
        # Every sequence has one token, as in most steps: a row is its sequence.
        query_start = np.arange(num_seqs + 1, dtype=np.int32)
        positions, max_query_len = num_computed.astype(np.int64), 1
        num_decodes = num_seqs
    else:
        query_start = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(num_new, out=query_start[1:])
        rows = rows.repeat(num_new)
        positions = np.arange(num_tokens) + (num_computed - query_start[:-1])[rows]
        max_query_len = int(num_new.max())
        num_decodes = int((num_new != 1).argmax())
        logits_rows = query_start[logits_rows + 1] - np.int64(1)
    block_index = positions // block_size
    offset = positions - block_index * block_size
    kv_len, tables = num_computed + num_new, step.block_tables
    if step.gaps is not None:
        let_go = np.zeros(num_seqs, np.int32)
        np.add.at(let_go, step.gaps[:, 0], step.gaps[:, 2] * np.int32(block_size))
        kv_len = kv_len - let_go
        tables = tuple(_closed(table, step.gaps) for table in tables)
    return Batch(
        token_ids=from_numpy(step.token_ids),
        positions=from_numpy(positions),
        # A slot's number has fewer than 31 bits; the offset widens it to 64.
        slots=tuple(
            [
                from_numpy(table[rows, block_index] * np.int32(block_size) + offset)
                for table in step.block_tables
            ]
        ),
        query_start=from_numpy(query_start),
        kv_len=from_numpy(kv_len),
        block_tables=tuple([from_numpy(_contiguous(table)) for table in tables]),
        logits_rows=from_numpy(logits_rows),
        max_query_len=max_query_len,
        num_decodes=num_decodes,
    )


def _closed(table: Int32, gaps: Int32) -> Int32:
    """Return block tables without the entries that were let go of: what is behind moves up."""
    closed = table.copy()
    # The last gap of a row first: closing it moves nothing that is before it.
    for row, first, count in reversed(gaps.tolist()):
        closed[row, first : table.shape[1] - count] = closed[row, first + count :].copy()
    return closed


def _contiguous(table: Int32) -> Int32:
    return table if table.flags.c_contiguous else np.ascontiguousarray(table)
