"""What prefill attention of a library is told, against doubles that compute from what they get."""

import sys
from types import SimpleNamespace

import pytest
import torch

from penstock.core.errors import StartupFailed
from penstock.engine.attention import AttentionSpec
from penstock.engine.attention.libraries import Fa3, FlashInfer, find_library
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.batch import Batch
from penstock.engine.kernels.cuda import CudaKernels
from tests.engine.attention_cases import TOLERANCE, make_case


def attend(query, cache, starts, kv_len, table, *, scale, window, softcap):
    """Compute in the meaning of the libraries' arguments."""
    heads, head_dim = query.shape[1:]
    spec = AttentionSpec(0, 0, heads, cache[0].shape[2], head_dim, scale, window, softcap)
    empty = torch.zeros(0, dtype=torch.int64)
    batch = Batch(empty, empty, (empty,), starts, kv_len, (table,), empty, 2)
    return ReferenceAttention().attend(spec, query, *cache, batch)


def with_kvcache(
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


class Wrapper:
    """Stands for `BatchPrefillWithPagedKVCacheWrapper`."""

    plans = 0

    def __init__(self, workspace, layout):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(
        self, starts, begin, blocks, last, heads, kv_heads, head_dim, block_size, *, causal,
        sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert causal
        assert begin[-1] == len(blocks)
        Wrapper.plans += 1
        counts = begin.diff()
        table = torch.full((len(counts), int(counts.max())), 2**30, dtype=torch.int32)
        for row, part in enumerate(torch.split(blocks, counts.tolist())):
            table[row, : len(part)] = part
        self.rest = (starts, (counts - 1) * block_size + last, table)
        self.how = {"scale": sm_scale, "window": window_left + 1, "softcap": logits_soft_cap or 0.0}
        self.shape = heads, kv_heads, head_dim

    def run(self, query, cache):
        assert (*query.shape[1:2], *cache[0].shape[2:]) == self.shape
        return attend(query, cache, *self.rest, **self.how)


LIBRARIES = {
    "fa3": lambda: Fa3(SimpleNamespace(flash_attn_with_kvcache=with_kvcache)),
    "flashinfer": lambda: FlashInfer(SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)),
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    ("lengths", "num_decodes", "options"),
    [
        ([(9, 30), (16, 16)], 0, {}),
        ([(1, 40), (1, 16), (9, 30), (5, 50)], 2, {"window": 17}),
        ([(1, 33), (20, 64)], 1, {"softcap": 5.0}),
    ],
)
def test_a_library_is_told_what_a_batch_means(name, lengths, num_decodes, options):
    case = make_case(lengths, dtype=torch.bfloat16, **options)
    object.__setattr__(case.batch, "num_decodes", num_decodes)
    case.check(CudaKernels(8, LIBRARIES[name]()))


def test_a_batch_is_planned_once_for_layers_of_a_kind():
    case = make_case([(9, 30)], dtype=torch.bfloat16)
    kernels = CudaKernels(8, LIBRARIES["flashinfer"]())
    before = Wrapper.plans
    for _ in range(3):
        case.check(kernels)
    assert Wrapper.plans == before + 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_does_not_know_our_kernel_does(name):
    case = make_case([(9, 30)], dtype=torch.bfloat16, sinks=True)
    case.check(CudaKernels(8, LIBRARIES[name]()))
    exact = make_case([(9, 30)], dtype=torch.float32)
    exact.check(CudaKernels(8, LIBRARIES[name]()))
    assert TOLERANCE[torch.float32] < 1e-4


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(StartupFailed, match=r"--attention-backend fa3: .*flash_attn_interface"):
        find_library("fa3")
    assert find_library("triton") is None
