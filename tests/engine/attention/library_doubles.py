"""Doubles of FlashAttention 3 and FlashInfer: they compute, slowly, what their arguments mean.

Names and parameters are those of `flash_attn_interface` and of `flashinfer`, as far as they are
used here; what is used otherwise than the libraries allow fails. `bench/h200` walks through them.
"""

import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.batch import Batch


def attend(query, cache, starts, kv_len, table, *, scale, window, softcap):
    """Compute in the meaning of the libraries' arguments."""
    heads, head_dim = query.shape[1:]
    spec = AttentionSpec(0, 0, heads, cache[0].shape[2], head_dim, scale, window, softcap)
    empty = torch.zeros(0, dtype=torch.int64)
    batch = Batch(empty, empty, (empty,), starts, kv_len, (table,), empty, 2)
    return ReferenceAttention().attend(spec, query, *cache, batch)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale,
    causal, window_size, softcap,
):  # fmt: skip
    assert causal
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q)
    left, right = window_size
    assert (left, right) == (-1, -1) or right == 0
    return attend(
        q, (k_cache, v_cache), cu_seqlens_q, cache_seqlens, page_table, scale=softmax_scale,
        window=left + 1, softcap=softcap,
    )  # fmt: skip


class BatchPrefillWithPagedKVCacheWrapper:
    """Of FlashInfer."""

    plans = 0

    def __init__(self, workspace, layout):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(
        self, starts, begin, blocks, last, heads, kv_heads, head_dim, block_size, *, causal,
        sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert causal
        assert begin[-1] == len(blocks)
        BatchPrefillWithPagedKVCacheWrapper.plans += 1
        self.rest = (starts, *_table(begin, blocks, last, block_size))
        self.how = {"scale": sm_scale, "window": window_left + 1, "softcap": logits_soft_cap or 0.0}
        self.shape = heads, kv_heads, head_dim

    def run(self, query, cache):
        assert (*query.shape[1:2], *cache[0].shape[2:]) == self.shape
        return attend(query, cache, *self.rest, **self.how)


class BatchDecodeWithPagedKVCacheWrapper:
    """Of FlashInfer."""

    def __init__(self, workspace, layout, *, use_tensor_cores=False):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")
        assert use_tensor_cores, "for groups of heads it is the quicker way"

    def plan(
        self, begin, blocks, last, heads, kv_heads, head_dim, block_size, *, q_data_type,
        kv_data_type,
    ):  # fmt: skip
        assert begin.dtype == blocks.dtype == last.dtype == torch.int32
        assert q_data_type == kv_data_type
        starts = torch.arange(len(begin), dtype=torch.int32)
        self.rest = (starts, *_table(begin, blocks, last, block_size))
        self.shape = heads, kv_heads, head_dim

    def run(self, query, cache):
        assert (*query.shape[1:2], *cache[0].shape[2:]) == self.shape
        scale = query.shape[2] ** -0.5
        return attend(query, cache, *self.rest, scale=scale, window=0, softcap=0.0)


def flash_attn_func(q, k, v, *, causal):
    assert causal
    group = q.shape[2] // k.shape[2]
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v)),
        is_causal=True,
    ).transpose(1, 2)  # fmt: skip


def _table(begin, blocks, last, block_size):
    """Return lengths and block tables of what FlashInfer is told."""
    counts = begin.diff()
    table = torch.full((len(counts), int(counts.max())), 2**30, dtype=torch.int32)
    for row, part in enumerate(torch.split(blocks, counts.tolist())):
        table[row, : len(part)] = part
    return (counts - 1) * block_size + last, table
