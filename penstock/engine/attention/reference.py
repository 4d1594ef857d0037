"""Paged attention in plain torch: the yardstick of the other back ends, and the fallback.

Gathers each sequence's keys and values and computes in float32, one sequence at a time. Any device,
dtype and head size. Slow: decode is some twenty times slower than the native back end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch


class ReferenceAttention:
    """Implements `AttentionBackend` with torch operations."""

    name = "reference"

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output `[T, num_heads, head_dim]`; see `AttentionBackend.attend`."""
        output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        starts, lengths = batch.query_start.tolist(), batch.kv_len.tolist()
        for index, length in enumerate(lengths):
            rows = slice(starts[index], starts[index + 1])
            num_rows = rows.stop - rows.start
            if num_rows == 0:
                continue
            oldest = max(0, length - num_rows - spec.window + 1) if spec.window else 0
            visible = torch.arange(oldest, length, device=query.device)
            table = batch.block_tables[spec.group][index].long()
            block_size = key_cache.shape[1]
            blocks, offsets = table[visible // block_size], visible % block_size
            keys, values = key_cache[blocks, offsets], value_cache[blocks, offsets]
            positions = torch.arange(length - num_rows, length, device=query.device)
            mask = visible[None] <= positions[:, None]
            if spec.window:
                mask &= visible[None] > positions[:, None] - spec.window
            output[rows] = _softmax_attention(spec, query[rows], keys, values, mask)
        return output

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Write rows to their slots; see `AttentionBackend.store`."""
        block_size = key_cache.shape[1]
        kept = (slots >= 0).nonzero()[:, 0]
        blocks, offsets = slots[kept] // block_size, slots[kept] % block_size
        key_cache[blocks, offsets] = key[kept].to(key_cache.dtype)
        value_cache[blocks, offsets] = value[kept].to(value_cache.dtype)


def _softmax_attention(
    spec: AttentionSpec, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """Return `[n, num_heads, head_dim]` for one sequence; `mask` is `[n, t]`, True is visible."""
    ratio = spec.num_heads // spec.num_kv_heads
    keys = keys.float().repeat_interleave(ratio, 1)
    values = values.float().repeat_interleave(ratio, 1)
    scores = torch.einsum("nhd,thd->hnt", query.float(), keys) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hnt,thd->nhd", weights, values).to(query.dtype)
