"""The decoder's operations by Triton kernels: what runs on CUDA, and in Triton's interpreter.

Owns the choice of launches for a batch: which rows decode, among how many programs a sequence's
slots are divided. Outputs and workspaces come from torch's allocator, so that a graph that is
captured keeps them in its own pool; nothing waits for the device. Matrix products are torch's.
`select_kernels` makes one; tests make one for CPU tensors where Triton interprets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from penstock.engine.attention.libraries import Chunks
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.triton.activate import activate
from penstock.engine.triton.heads import store_heads
from penstock.engine.triton.norm import add_norm, norm_rows
from penstock.engine.triton.paged_attention import (
    Sequences,
    SplitSpace,
    decode_splits,
    num_tiles,
    paged_attention,
)

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.attention.libraries import PrefillAttention
    from penstock.engine.batch import Batch
    from penstock.engine.kernels import Activation, HeadsSpec, Norm

PREFILL_SPLITS_MAX: Final = 8
"""Parts of a prefill are as long as its rows, so more of them would move more than they save."""


class CudaKernels(ReferenceKernels):
    """Implements `Kernels` with Triton; embedding, matrix products and row selection by torch."""

    name = "triton"

    def __init__(self, num_multiprocessors: int, prefill: PrefillAttention | None = None) -> None:
        """Take the number of multiprocessors that attention is to fill, and what attends for
        chunks of prompts in place of our own kernel.
        """
        super().__init__()
        self.num_multiprocessors = num_multiprocessors
        self._prefill = prefill
        self._chunks: tuple[Batch, dict[int, Chunks]] | None = None

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the norm of every row."""
        normed = torch.empty_like(x)
        norm_rows(x, norm, normed)
        return normed

    def add(self, residual: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
        """Return `residual + scale * delta`; torch's sum is rounded once as well."""
        return residual + delta if scale == 1.0 else super().add(residual, delta, scale)

    def add_norm(
        self, residual: Tensor, delta: Tensor, norm: Norm, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm."""
        total, normed = torch.empty_like(residual), torch.empty_like(residual)
        add_norm(residual, delta, scale, norm, total=total, normed=normed)
        return total, normed

    def heads(
        self,
        spec: HeadsSpec,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Norm and turn queries and keys, store keys and values; see `Kernels.heads`."""
        shape = spec.attention
        query = qkv.new_empty(len(qkv), shape.num_heads, shape.head_dim)
        slots = batch.slots[shape.group]
        store_heads(spec, qkv, (key_cache, value_cache), batch.positions, slots, query)
        return query

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output of every query row: decoding rows in a call of their own."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in _parts(spec, batch, len(query)):
            prefill = self._prefill
            if part.max_query_len > 1 and prefill is not None and prefill.can(spec, query.dtype):
                chunks = self._chunks_of(batch, spec.group, part)
                first = len(query) - part.num_rows
                cache = key_cache, value_cache
                output[first:] = prefill.attend(spec, query[first:], cache, chunks)
                continue
            splits = self._split_space(spec, query, part)
            paged_attention(spec, query, (key_cache, value_cache), part, output, splits=splits)
        return output

    def activate(self, x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
        """Return the activation of every row."""
        output = x.new_empty(len(x), x.shape[1] // (2 if gated else 1))
        activate(x, activation, output, gated=gated)
        return output

    def select_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the rows that need logits; all of them where every sequence decodes."""
        is_all = batch.num_decodes == len(batch.logits_rows) == len(x)
        return x if is_all else super().select_rows(x, batch)

    def num_splits(self, spec: AttentionSpec, num_sequences: int) -> int:
        """Return among how many programs a launch divides the slots of sequences that decode."""
        return decode_splits(num_sequences, spec.num_kv_heads, self.num_multiprocessors)

    def _chunks_of(self, batch: Batch, group: int, part: Sequences) -> Chunks:
        """Return a batch's chunks, the same object for every layer of a group."""
        if self._chunks is None or self._chunks[0] is not batch:
            self._chunks = batch, {}
        found = self._chunks[1]
        if group not in found:
            start = part.query_start - part.query_start[0]
            found[group] = Chunks(start, part.kv_len, part.block_table, part.max_query_len)
        return found[group]

    def _split_space(
        self, spec: AttentionSpec, query: Tensor, part: Sequences
    ) -> SplitSpace | None:
        if part.max_query_len == 1:
            num_splits = self.num_splits(spec, len(part.kv_len))
        else:
            tiles = num_tiles(spec, query.dtype, part)
            num_splits = min(PREFILL_SPLITS_MAX, self.num_splits(spec, tiles))
        if num_splits == 1:
            return None
        shape = num_splits, part.num_rows, spec.num_heads
        output = torch.empty(*shape, spec.head_dim, dtype=torch.float32, device=query.device)
        return SplitSpace(output, output.new_empty(shape))


def _parts(spec: AttentionSpec, batch: Batch, num_rows: int) -> list[Sequences]:
    """Return the sequences that decode, which come first, and then the others, if there are any."""
    num_sequences, num_decodes = len(batch.kv_len), batch.num_decodes
    table = batch.block_tables[spec.group]
    whole = Sequences(batch.query_start, batch.kv_len, table, num_rows, batch.max_query_len)
    if num_decodes in (0, num_sequences):
        return [whole]
    return [
        whole.part(0, num_decodes, num_decodes, 1),
        whole.part(num_decodes, num_sequences, num_rows - num_decodes, batch.max_query_len),
    ]
