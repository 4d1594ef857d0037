"""A codec on the device over one pool, for moves to and from the tiers below it.

Owns the rows that encoded blocks lie in on their way, and a stream. Does not know tiers or what is
done with the bytes; `triton/codecs.py` computes. Used by one thread at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import torch

from penstock.core.types import MIB
from penstock.engine.triton.codecs import TRITON_CODECS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

ROWS_BYTES: Final = 32 * MIB
_LINE: Final = 16


class PoolCodec:
    """Encodes blocks of `pool`, `[num_blocks, layers, 2, block_size, heads, head_dim]`, into `rows`
    and decodes them out of there.

    `rows` is `[n, encoded_bytes, and a few more]` uint8 on the pool's device, made by `allocate`
    where that is given. Raises: `KeyError` for a codec that the device has not got.
    """

    def __init__(
        self, name: str, pool: Tensor, *, allocate: Callable[[int, int], Tensor] | None = None
    ) -> None:
        self.name = name
        self._codec = TRITON_CODECS[name]
        self._pool = pool
        self.encoded_bytes = self._codec.encoded_bytes(pool)
        # Rows begin where 16 bytes at a time can be read and written.
        width = -(-self.encoded_bytes // _LINE) * _LINE
        num_rows = min(len(pool), max(1, ROWS_BYTES // width))
        self.rows = allocate(num_rows, width) if allocate else self._rows(num_rows, width)
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]

    def encode(self, block_ids: Sequence[int]) -> None:
        """Encode block `block_ids[i]` into row i, behind the work given to the device so far by
        this thread; return when that is done.
        """
        with self._on_stream():
            self._codec.encode(self._pool, self._ids(block_ids), self.rows)
            self._wait()

    def decode(self, block_ids: Sequence[int]) -> None:
        """Decode row i into block `block_ids[i]`; return when that is done."""
        with self._on_stream():
            self._codec.decode(self.rows, self._pool, self._ids(block_ids))
            self._wait()

    def _rows(self, num_rows: int, width: int) -> Tensor:
        return torch.empty(num_rows, width, dtype=torch.uint8, device=self._pool.device)

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self._pool.device)

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            done.synchronize()
