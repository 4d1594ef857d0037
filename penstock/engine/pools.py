"""KV pools as tensors: one block behind the other, each block one span.

Owns their shape and where a device's are allocated. `penstock.core.block` draws a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from penstock.core.errors import StartupFailed
from penstock.core.types import GIB

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.core.block import KVLayout
    from penstock.engine.device import Device


def pool_shape(layout: KVLayout, group: int, num_blocks: int) -> tuple[int, ...]:
    """Return `[num_blocks, layers, 2, block_size, num_kv_heads, head_dim]`."""
    num_layers = len(layout.groups[group].layers)
    return (num_blocks, num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)


def make_pools(layout: KVLayout, num_blocks: Sequence[int], device: Device) -> list[Tensor]:
    """Return a pool per group in a device's memory, filled with whatever lay there.

    Raises: `StartupFailed` when there is not enough memory.
    """
    try:
        return [
            torch.empty(
                pool_shape(layout, group, count),
                dtype=getattr(torch, layout.dtype),
                device=device.torch_device,
            )
            for group, count in enumerate(num_blocks)
        ]
    except torch.OutOfMemoryError as error:
        groups = zip(num_blocks, layout.block_bytes, strict=True)
        wanted = sum(count * size for count, size in groups)
        raise StartupFailed(
            f"the KV cache of {wanted / GIB:.1f} GiB does not fit into what is left of the device "
            "beside the weights: lower --gpu-memory-utilization or --kv-cache-memory"
        ) from error
