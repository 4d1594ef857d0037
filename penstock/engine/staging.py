"""Takes what a step needs to the device in one copy, and what it has found back.

`Staging` owns a stretch of pinned memory and one of the device's, and lays arrays behind each other
there. What it has returned holds until the next call, and the next call may come once the device
has read it: whoever waits for a step's tokens has waited for that. `Readback` has pinned memory for
two steps, so that the second may be launched before the first is read. An executor owns one each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from penstock.engine.device import Device

ALIGNMENT: Final = 16
"""Bytes at which each array begins, so that kernels may read it 16 bytes at a time."""


class Staging:
    """Room for what one step needs; grows when a step needs more."""

    def __init__(self, device: Device, capacity_bytes: int = 1 << 16) -> None:
        self._device = device
        self._grow(capacity_bytes)

    def send(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Return the CPU tensors on the device: views of one copy that does not block."""
        places, end = [], 0
        for array in arrays:
            places.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if end > len(self._host):
            self._grow(2 * end)
        for place, array in zip(places, arrays, strict=True):
            _view(self._host, place, array).copy_(array)
        self._there[:end].copy_(self._host[:end], non_blocking=True)
        return [
            _view(self._there, place, array) for place, array in zip(places, arrays, strict=True)
        ]

    def _grow(self, capacity_bytes: int) -> None:
        is_cuda = self._device.is_cuda
        self._host = torch.empty(capacity_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._there = torch.empty(
            capacity_bytes, dtype=torch.uint8, device=self._device.torch_device
        )


class Readback:
    """Brings tensors to the host behind all that was launched before."""

    def __init__(self, device: Device, capacity_bytes: int = 1 << 12) -> None:
        self._is_cuda = device.is_cuda
        self._rooms = [self._room(capacity_bytes) for _ in range(2)]

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        """Begin to copy; return what waits for the end of it, and of everything before.

        What that returns is the caller's. At most two may be under way.
        """
        num_bytes = sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
        room = self._rooms.pop(0)
        if num_bytes > len(room):
            room = self._room(2 * num_bytes)
        self._rooms.append(room)
        copies, end = [], 0
        for tensor in tensors:
            copies.append(_view(room, end, tensor).copy_(tensor, non_blocking=True))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

        def wait() -> list[np.ndarray]:
            if event is not None:
                event.synchronize()
            return [copy.numpy().copy() for copy in copies]

        return wait

    def _room(self, capacity_bytes: int) -> Tensor:
        return torch.empty(capacity_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)


def _view(room: Tensor, place: int, like: Tensor) -> Tensor:
    """Return a part of the room with the dtype and shape of another tensor."""
    num_bytes = prod(like.shape) * like.element_size()
    return room[place : place + num_bytes].view(like.dtype).view(like.shape)
