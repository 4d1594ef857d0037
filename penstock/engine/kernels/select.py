"""Choose the kernels for a device and dtype. Called once, where a model is loaded."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from penstock.engine.attention.libraries import TRITON, find_library
from penstock.engine.device import Device
from penstock.engine.kernels.cpu import CpuKernels
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.native.library import load_library
from penstock.engine.native.structs import DTYPES

if TYPE_CHECKING:
    from penstock.engine.kernels import Kernels


def select_kernels(device: Device, dtype: torch.dtype, attention: str = TRITON) -> Kernels:
    """Return the fastest kernels that run here. Their `notice` says what is missing, if anything.

    `attention` names what attends for prompts on a device; see `attention/libraries.py`.

    On first use on a machine this compiles the native kernels, which takes seconds.
    """
    if device.has_triton:
        # Triton may not be installed where nobody asks for it.
        from penstock.engine.kernels.cuda import CudaKernels

        return CudaKernels(device.num_multiprocessors, find_library(attention))
    if dtype not in DTYPES:
        notice = f"the CPU kernels know float32 and bfloat16; {dtype} runs on torch, much slower"
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
        return ReferenceKernels(notice)
    loaded = load_library()
    if loaded.library is None:
        return ReferenceKernels(loaded.notice)
    return CpuKernels(loaded.library)
