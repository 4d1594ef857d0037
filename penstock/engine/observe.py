"""Measures what the end of a prompt looks at, so that a worker can keep it alone (SnapKV).

`Observer` lets the model read the last tokens of a prompt once more, over the KV that is there,
operation by operation and writing none of it, with its attention watched (`watching.py`). So the
steps themselves stay as fast and as exact as they are, and choosing costs a few tokens of every
long prompt that asks for it. What is chosen is said by `penstock/kv/selection.py`; the executor's
thread calls this when a step is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.batch import Batch
from penstock.engine.watching import WatchedKernels, attention_weights
from penstock.kv.selection import snap_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from penstock.core.step import Int32, Observation, Step
    from penstock.engine.attention import AttentionSpec
    from penstock.engine.kernels import Kernels
    from penstock.engine.model import LoadedModel


class Observer:
    """A loaded model that reads over the pools of one worker without writing to them."""

    def __init__(self, model: LoadedModel, pools: Sequence[Tensor]) -> None:
        """Bind a model to a pool per group, each as `penstock.core.block` draws it."""
        self._votes: list[npt.NDArray[np.float32]] = []
        """Of each layer, in turn."""
        kernels = cast("Kernels", WatchedKernels(model.kernels, self._count))
        self._run = model.forward.bind(kernels, pools)
        self._block_size = pools[0].shape[3]
        self._device = pools[0].device

    def observe(self, step: Step) -> tuple[tuple[float, ...], ...]:
        """Return for each observation of a step that is over how much its tokens look at each block
        before them: SnapKV's votes, pooled, summed over the block, all heads and all layers.
        """
        tables = step.block_tables[0]
        return tuple(self.look(seen, tables[seen.row]) for seen in step.observations)

    def look(self, seen: Observation, table: Int32) -> tuple[float, ...]:
        """Return the scores of one observation; `table` [W] int32 has the sequence's blocks."""
        self._votes.clear()
        with torch.inference_mode():
            self._run(_batch(seen, table, self._block_size).to(self._device))
        assert self._votes, seen
        votes = sum(self._votes[1:], self._votes[0])
        assert len(votes) == seen.position, (seen, votes.shape)
        starts = np.arange(0, seen.position, self._block_size)
        return tuple(np.add.reduceat(votes, starts).tolist())

    def _count(self, spec: AttentionSpec, query: Tensor, key_cache: Tensor, batch: Batch) -> None:
        """Take one layer's votes."""
        table, length = batch.block_tables[spec.group][0], int(batch.kv_len[0])
        weights = attention_weights(spec, query, key_cache, table, length)
        self._votes.append(snap_scores(weights.cpu().numpy(), spec.num_kv_heads).sum(0))


def _batch(seen: Observation, table: Int32, block_size: int) -> Batch:
    """Return the tokens that vote as a batch that stores nothing and wants no logits."""
    num_rows = len(seen.token_ids)
    end = seen.position + num_rows
    num_blocks = -(-end // block_size)
    return Batch(
        token_ids=torch.tensor(seen.token_ids, dtype=torch.int64),
        positions=torch.arange(seen.position, end),
        slots=(torch.full((num_rows,), -1, dtype=torch.int64),),
        query_start=torch.tensor([0, num_rows], dtype=torch.int32),
        kv_len=torch.tensor([end], dtype=torch.int32),
        block_tables=(torch.from_numpy(table[None, :num_blocks].copy()),),
        logits_rows=torch.zeros(0, dtype=torch.int64),
        max_query_len=num_rows,
    )
