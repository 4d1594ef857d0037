"""Choose the kernels for a device and dtype. Called once, where a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.engine.kernels.reference import ReferenceKernels

if TYPE_CHECKING:
    from penstock.engine.kernels import Kernels


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels that run here; their `notice` says what is missing, if anything."""
    del device, dtype
    return ReferenceKernels()
