"""What a model attends to, beside its computing: kernels that are watched, and attention's weights.

No fast kernel keeps the weights, so they are computed once more in torch, operation by operation.
`kv_access.py` writes them down for studies, `observe.py` lets the end of a prompt vote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch
    from penstock.engine.kernels import Kernels


class WatchedKernels:
    """Kernels that tell `watch` of every attention before they compute it; all else is theirs."""

    def __init__(
        self, kernels: Kernels, watch: Callable[[AttentionSpec, Tensor, Tensor, Batch], None]
    ) -> None:
        self._kernels = kernels
        self._watch = watch

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the kernels have
        return getattr(self._kernels, name)

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
        """Return the attention output, and tell of it; see `AttentionBackend`."""
        self._watch(spec, query, key_cache, batch)
        return self._kernels.attend(spec, query, key_cache, value_cache, batch)


def attention_weights(
    spec: AttentionSpec, query: Tensor, key_cache: Tensor, table: Tensor, length: int
) -> Tensor:
    """Return the attention of the last rows of one sequence, [num_heads, rows, length] float32.

    `query` is [rows, num_heads, head_dim], `key_cache` [num_blocks, block_size, num_kv_heads,
    head_dim], `table` the blocks of the sequence, of which `length` slots are filled. Each row sees
    the slots up to its own, as far back as a window goes; rows sum to 1, or less where sinks take a
    part.
    """
    rows, num_blocks = query.shape[0], -(-length // key_cache.shape[1])
    keys = key_cache[table[:num_blocks].long()].flatten(0, 1)[:length].float()
    by_head = query.float().view(rows, spec.num_kv_heads, -1, spec.head_dim)
    own = torch.arange(length - rows, length, device=keys.device)[:, None]
    slots = torch.arange(length, device=keys.device)
    hidden = slots > own
    if spec.window:
        hidden |= slots <= own - spec.window
        # Nobody has written, or looks at, what lies behind all windows.
        keys = keys.masked_fill(hidden.all(0)[:, None, None], 0.0)
    scores = torch.einsum("rgqd,tgd->gqrt", by_head, keys).flatten(0, 1) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = spec.sinks.float().view(-1, 1, 1).expand(-1, rows, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
