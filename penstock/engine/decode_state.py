"""The rows that decode, kept on the device from step to step, and what the host knows of them.

Owns the tensors that captured steps read and write, and a mirror of them in host memory. A step of
the worker's is compared with the mirror: rows that are as the last step has left them, one token
further, need nothing; records of all others go over in one copy, and a kernel puts them in place.
`DeviceExecutor` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from penstock.engine.batch import Batch
from penstock.engine.triton.decode_rows import HEADER_WORDS, DecodeRows, advance_rows, patch_rows
from penstock.engine.triton.sample import SamplingRows

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.core.request import SamplingParams
    from penstock.core.step import Int32, Int64, Step
    from penstock.engine.device import Device
    from penstock.engine.sampler import Int64 as Tokens
    from penstock.engine.staging import Staging

_MASK: Final = (1 << 64) - 1
_PADDING: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """How many rows may decode, blocks of a row in each of the groups, and tokens of a block."""

    num_rows: int
    num_groups: int
    max_blocks: int
    block_size: int


class DecodeState:
    """Rows `[0, num_rows)`; those that no sequence has are padding, and compute nothing."""

    def __init__(self, device: Device, shape: DecodeShape) -> None:
        """Make room on the device; every row is padding."""
        n, groups = shape.num_rows, shape.num_groups
        self.shape = shape
        self.rows = _make_rows(device.torch_device, shape)
        self.sampled = torch.zeros(n, dtype=torch.int64, device=device.torch_device)
        self._query_start = torch.arange(n + 1, dtype=torch.int32, device=device.torch_device)
        self._all_rows = torch.arange(n, device=device.torch_device)
        self._tokens = np.zeros(n, np.int64)
        self._positions = np.full(n, _PADDING, np.int64)
        self._tables = np.zeros((groups, n, shape.max_blocks), np.int32)
        self._params: list[SamplingParams | None] = [None] * n

    def batch(self, num_rows: int) -> Batch:
        """Return the first rows as a batch: views, so that a graph reads what is there then."""
        rows = self.rows
        return Batch(
            token_ids=rows.token_ids[:num_rows],
            positions=rows.sampling.positions[:num_rows],
            slots=tuple(rows.slots[:, :num_rows]),
            query_start=self._query_start[: num_rows + 1],
            kv_len=rows.kv_len[:num_rows],
            block_tables=tuple(rows.tables[:, :num_rows]),
            logits_rows=self._all_rows[:num_rows],
            max_query_len=1,
            num_decodes=num_rows,
        )

    def advance(self, num_rows: int) -> None:
        """Make what was sampled for the first rows the tokens of the next step, on the device."""
        advance_rows(self.sampled[:num_rows], self.rows, self.shape.block_size)

    def note_advanced(self, tokens: Tokens) -> None:
        """Take note that the first rows were advanced, and to which tokens `[n]`."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] += 1

    def update(self, step: Step, num_rows: int, staging: Staging) -> int:
        """Make the first `num_rows` rows those of a step that decodes, the rest of them padding.

        Returns how many rows had to be sent to the device; 0 in a steady state.
        """
        count = len(step.num_new)
        changed = self._changed(step, count)
        stale = count + np.flatnonzero(self._positions[count:num_rows] != _PADDING)
        if not len(changed) and not len(stale):
            return 0
        width = step.block_tables[0].shape[1]
        records = self._records(np.concatenate([changed, stale]), width)
        self._fill(records[: len(changed)], step, changed)
        self._note(step, changed, stale)
        (there,) = staging.send([torch.from_numpy(records)])
        patch_rows(there, self.rows, self.shape.block_size)
        return len(records)

    def _changed(self, step: Step, count: int) -> Int64:
        """Return the rows of a step that are not what the device has."""
        differs = (self._tokens[:count] != step.token_ids) | (
            self._positions[:count] != step.num_computed
        )
        for table, known in zip(step.block_tables, self._tables, strict=True):
            differs |= (known[:count, : table.shape[1]] != table).any(1)
        for row, (sample, params) in enumerate(zip(step.samples, self._params, strict=False)):
            if sample.params is not params:
                differs[row] = True
        return np.flatnonzero(differs)

    def _records(self, rows: Int64, width: int) -> Int32:
        """Return records of padding: rows without tokens."""
        words = HEADER_WORDS + self.shape.num_groups * width
        records = np.zeros((len(rows), words), np.int32)
        records[:, 0] = rows
        return records

    def _fill(self, records: Int32, step: Step, rows: Int64) -> None:
        """Complete the records of a step's rows; see `decode_rows` for the places."""
        params = [step.samples[row].params for row in rows]
        seeds = []
        for row in rows:
            seed = step.samples[row].params.seed
            assert seed is not None, "the front end gives every request a seed"
            seeds.append(seed & _MASK)
        records[:, 1] = step.num_computed[rows] + 1
        records[:, 2:4] = _words(step.token_ids[rows])
        records[:, 4:6] = _words(step.num_computed[rows].astype(np.int64))
        records[:, 6:8] = _words(np.array(seeds, np.uint64))
        records[:, 8:10] = _words(np.array([p.top_p for p in params], np.float64))
        records[:, 10:11] = _words(np.array([p.temperature for p in params], np.float32))
        records[:, 11:12] = _words(np.array([p.min_p for p in params], np.float32))
        records[:, 12] = [max(0, p.top_k) for p in params]
        blocks = records[:, HEADER_WORDS:].reshape(len(rows), self.shape.num_groups, -1)
        for group, table in enumerate(step.block_tables):
            blocks[:, group] = table[rows]

    def _note(self, step: Step, changed: Int64, stale: Int64) -> None:
        """Bring the mirror to where the device will be."""
        self._tokens[changed] = step.token_ids[changed]
        self._positions[changed] = step.num_computed[changed]
        self._positions[stale] = _PADDING
        rows = np.concatenate([changed, stale])
        for table, known in zip(step.block_tables, self._tables, strict=True):
            known[rows, : table.shape[1]] = 0
            known[changed, : table.shape[1]] = table[changed]
        for row in changed:
            self._params[row] = step.samples[row].params
        for row in stale:
            self._params[row] = None


def _make_rows(device: torch.device, shape: DecodeShape) -> DecodeRows:
    n, groups = shape.num_rows, shape.num_groups

    def zeros(*dims: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(dims, dtype=dtype, device=device)

    return DecodeRows(
        token_ids=zeros(n, dtype=torch.int64),
        kv_len=zeros(n, dtype=torch.int32),
        slots=torch.full((groups, n), -1, device=device),
        tables=zeros(groups, n, shape.max_blocks, dtype=torch.int32),
        sampling=SamplingRows(
            temperature=zeros(n, dtype=torch.float32),
            min_p=zeros(n, dtype=torch.float32),
            top_p=torch.ones(n, dtype=torch.float64, device=device),
            top_k=zeros(n, dtype=torch.int32),
            seeds=zeros(n, dtype=torch.int64),
            positions=zeros(n, dtype=torch.int64),
        ),
    )


def _words(values: np.ndarray) -> Int32:
    """Return numbers as words of 32 bits, `[n, size / 4]`."""
    return values.view(np.int32).reshape(len(values), -1)
