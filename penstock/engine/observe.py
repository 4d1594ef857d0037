"""Measures what the end of a prompt looks at, so that a worker can keep it alone (SnapKV).

`Observer` lets the model read the last tokens of a prompt once more, over the KV that is there,
operation by operation and writing none of it. Attention is computed by the model's own kernels as
ever, and beside that in torch for its weights, which no fast kernel keeps. So the steps themselves
stay as fast and as exact as they are, and choosing costs a few tokens of every long prompt that
asks for it. What is chosen is said by `penstock/kv/selection.py`; the executor's thread calls this
when a step is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.batch import Batch
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
        self._kernels = WatchingKernels(model.kernels)
        self._run = model.forward.bind(cast("Kernels", self._kernels), pools)
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
        self._kernels.begin()
        with torch.inference_mode():
            self._run(_batch(seen, table, self._block_size).to(self._device))
        votes = self._kernels.votes
        assert votes is not None, seen
        assert len(votes) == seen.position, (seen, votes.shape)
        starts = np.arange(0, seen.position, self._block_size)
        return tuple(np.add.reduceat(votes, starts).tolist())


class WatchingKernels:
    """Kernels that note what the rows of a batch of one sequence attend to; all else is that of
    `kernels`. `votes` is [tokens before the rows] float32, over the layers since `begin`.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.votes: npt.NDArray[np.float32] | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the kernels have
        return getattr(self._kernels, name)

    def begin(self) -> None:
        """Forget what has been noted."""
        self.votes = None

    def prepare(self, forward: Callable[[Kernels, Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Return the forward as it is: a recorded program would not stop at attention."""
        return lambda batch: forward(cast("Kernels", self), batch)

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output, and note what it looked at; see `AttentionBackend`."""
        weights = attention_weights(spec, query, key_cache, batch)
        found = snap_scores(weights.cpu().numpy(), spec.num_kv_heads).sum(0)
        self.votes = found if self.votes is None else self.votes + found
        return self._kernels.attend(spec, query, key_cache, value_cache, batch)


def attention_weights(
    spec: AttentionSpec, query: Tensor, key_cache: Tensor, batch: Batch
) -> Tensor:
    """Return the attention of a batch of one sequence, [num_heads, rows, kv_len] float32.

    `query` is [rows, num_heads, head_dim], `key_cache` [num_blocks, block_size, num_kv_heads,
    head_dim]. Each row sees the slots up to its own; rows sum to 1, or less where sinks take a
    part. For layers without a window.
    """
    length = int(batch.kv_len[0])
    rows = query.shape[0]
    num_blocks = -(-length // key_cache.shape[1])
    table = batch.block_tables[spec.group][0, :num_blocks].long()
    keys = key_cache[table].flatten(0, 1)[:length].float()
    by_head = query.float().view(rows, spec.num_kv_heads, -1, spec.head_dim)
    scores = torch.einsum("rgqd,tgd->gqrt", by_head, keys).flatten(0, 1) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    own = torch.arange(length - rows, length, device=scores.device)
    hidden = torch.arange(length, device=scores.device) > own[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = spec.sinks.float().view(-1, 1, 1).expand(-1, rows, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


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
