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
        self._gaps: dict[int, tuple[range, ...]] = {}

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

    def open_gaps(self, row: int, gaps: tuple[range, ...]) -> None:
        """Zero entries of the one group, and know these gaps, which lie behind each other."""
        for gap in gaps:
            self.clear(0, row, gap)
        if gaps:
            self._gaps[row] = gaps

    def gaps(self, rows: Iterable[int]) -> Int32 | None:
        """Return the gaps of the rows given, [G, 3]: the how many-th row it is, the first entry of
        the gap, and how many; None where no row has one.
        """
        if not self._gaps:
            return None
        gaps = [(at, gap) for at, row in enumerate(rows) for gap in self._gaps.get(row, ())]
        found = [(at, gap.start, len(gap)) for at, gap in gaps]
        return np.array(found, np.int32) if found else None

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
