"""What prefill attention of a library is told, against doubles that compute from what they get."""

import sys

import pytest
import torch

from penstock.core.errors import StartupFailed
from penstock.engine.attention.libraries import Fa3, FlashInfer, find_library
from penstock.engine.kernels.cuda import CudaKernels
from tests.engine.attention import library_doubles
from tests.engine.attention_cases import TOLERANCE, make_case

LIBRARIES = {
    "fa3": lambda: Fa3(library_doubles),
    "flashinfer": lambda: FlashInfer(library_doubles),
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
    before = library_doubles.BatchPrefillWithPagedKVCacheWrapper.plans
    for _ in range(3):
        case.check(kernels)
    assert library_doubles.BatchPrefillWithPagedKVCacheWrapper.plans == before + 1


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
