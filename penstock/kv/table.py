"""Block tables as numpy rows, so that a step's tables for a hundred sequences are one fancy index.

One row per request and group; entries that hold no block are 0. Owned and called by `kv/cache.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from penstock.core.step import Int32
from penstock.core.types import BlockId

ROWS_AT_START: Final = 64
COLUMNS_AT_START: Final = 64


class BlockTables:
    """Rows for requests, the same in every group; arrays double when they are full."""

    def __init__(self, num_groups: int) -> None:
        self._arrays = [
            np.zeros((ROWS_AT_START, COLUMNS_AT_START), np.int32) for _ in range(num_groups)
        ]
        self._free_rows = list(reversed(range(ROWS_AT_START)))
        self._gaps: dict[int, tuple[int, int]] = {}

    def take_row(self) -> int:
        """Return an unused row, all zero."""
        if not self._free_rows:
            rows, columns = self._arrays[0].shape
            self._resize(2 * rows, columns)
            self._free_rows = list(reversed(range(rows, 2 * rows)))
        return self._free_rows.pop()

    def give_row(self, row: int) -> None:
        """Take a row back and clear it."""
        for array in self._arrays:
            array[row] = 0
        self._gaps.pop(row, None)
        self._free_rows.append(row)

    def write(self, group: int, row: int, start: int, block_ids: Sequence[BlockId]) -> None:
        """Set entries `[start, start + len(block_ids))`."""
        end = start + len(block_ids)
        rows, columns = self._arrays[0].shape
        if end > columns:
            self._resize(rows, max(2 * columns, end))
        self._arrays[group][row, start:end] = block_ids

    def clear(self, group: int, row: int, entries: range) -> None:
        """Zero consecutive entries."""
        self._arrays[group][row, entries.start : entries.stop] = 0

    def open_gap(self, row: int, first: int, entries: range) -> None:
        """Zero consecutive entries of the one group, the last of a gap that begins at `first`."""
        if entries:
            self.clear(0, row, entries)
            self._gaps[row] = first, entries.stop - first

    def gaps(self, rows: Iterable[int]) -> Int32 | None:
        """Return where each row's gap begins and its length, [S, 2]; None where no row has one."""
        if not self._gaps:
            return None
        found = [self._gaps.get(row, (0, 0)) for row in rows]
        return np.array(found, np.int32) if any(count for _, count in found) else None

    def gather(self, rows: Sequence[int], width: int) -> tuple[Int32, ...]:
        """Return a copy of the first `width` entries of rows, [len(rows), width] per group."""
        if width > self._arrays[0].shape[1]:
            self._resize(self._arrays[0].shape[0], width)
        index = np.array(rows, np.intp)
        return tuple(array[index, :width] for array in self._arrays)

    def _resize(self, rows: int, columns: int) -> None:
        for group, old in enumerate(self._arrays):
            new = np.zeros((rows, columns), np.int32)
            new[: old.shape[0], : old.shape[1]] = old
            self._arrays[group] = new
