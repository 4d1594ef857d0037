"""Digests of a pool on a device, for whoever has numbers of blocks and wants what is in them told.

Owns constants and workspace of one pool, a stream and the memory through which numbers and digests
cross; `triton/digest.py` computes. Does not know steps or moves. Called by the executor's thread
and by those that move blocks, one at a time each.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import torch

from penstock.core.types import MIB, NO_DIGEST, Digest
from penstock.engine.triton.digest import digest_blocks, digest_space

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from penstock.core.types import BlockId

WORKSPACE_BYTES: Final = 32 * MIB
_SIXTEENTH: Final = 16
"""Sums are so much smaller than a block."""


class DeviceDigests:
    """Takes the digests of blocks of `pool`, `[num_blocks, ...]`, contiguous, on any device.

    They are the ones that `penstock/transfer/digest.py` takes of the same bytes.
    """

    def __init__(self, pool: Tensor, *, workspace_bytes: int = WORKSPACE_BYTES) -> None:
        self._blocks = pool.view(len(pool), -1).view(torch.uint8)
        at_once = max(1, workspace_bytes * _SIXTEENTH // self._blocks.shape[1])
        self._space = digest_space(self._blocks, min(at_once, len(pool)))
        is_cuda = pool.is_cuda
        size = len(self._space.sums)
        self._crossing = torch.empty(size, dtype=torch.int64, pin_memory=is_cuda)
        self._ids, self._found = (
            torch.empty(size, dtype=torch.int64, device=pool.device) for _ in range(2)
        )
        self._stream = torch.cuda.Stream(pool.device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def take(self, block_ids: Sequence[BlockId]) -> tuple[Digest, ...]:
        """Return the digests of blocks, as they are when the work given to the device so far by
        this thread is done; waits for that.
        """
        if not block_ids:  # as after most steps
            return ()
        size, found = len(self._crossing), []
        with self._lock, self._on_stream():
            for start in range(0, len(block_ids), size):
                found += self._some(block_ids[start : start + size])
        return tuple(Digest(digest or ~NO_DIGEST) for digest in found)

    def _some(self, block_ids: Sequence[BlockId]) -> list[int]:
        n = len(block_ids)
        self._crossing[:n] = torch.tensor(block_ids, dtype=torch.int64)
        ids, found = self._ids[:n], self._found[:n]
        ids.copy_(self._crossing[:n], non_blocking=True)
        digest_blocks(self._blocks, ids, self._space, found)
        self._crossing[:n].copy_(found, non_blocking=True)
        if self._stream is not None:
            # An event that sleeps: a thread that spun would keep the interpreter's loop waiting.
            landed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            landed.record(self._stream)
            landed.synchronize()
        return [number % (1 << 64) for number in self._crossing[:n].tolist()]

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._blocks.device))
        return torch.cuda.stream(self._stream)
