"""Paged attention behind one call: what every back end is given and must return.

Owns the description of an attention layer and the protocol. Does not know how blocks are allocated,
which request a row belongs to, or where weights come from. The decoder calls it, and so does the
path that runs an untouched Hugging Face model. Variants: `reference` (torch, any device and dtype),
`cpu` (C++).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """Describe one attention layer.

    `group` and `layer_in_group` say which pool holds its KV and which plane of it. `window` counts
    the visible tokens, the query's own included; 0 is full attention. `softcap` 0 is none. `sinks`
    is one extra logit per query head, `[num_heads]` float32, which takes part in the softmax and
    carries no value.
    """

    group: int
    layer_in_group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Computes attention over block-major pools."""

    @property
    def name(self) -> str:
        """Name for logs and for `doctor`."""

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Return the attention output of every query row.

        `query` is `[T, num_heads, head_dim]`, any row stride; so is the (contiguous) result.
        `key_cache` and `value_cache` are strided views `[num_blocks, block_size, num_kv_heads,
        head_dim]` whose last dimension is contiguous. Row i of a sequence with n rows sees the
        slots up to `kv_len - n + i`. Blocks and slots outside what some row sees are never read, so
        they may hold anything.
        """

    def store(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        """Write rows `[T, num_kv_heads, head_dim]` to `slots` `[T]` int64; -1 writes nothing."""
