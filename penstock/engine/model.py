"""A loaded model: what runs it, what it is called, and the shape of its KV.

Owns the interface that the flat decoder and the untouched Hugging Face model share, and the split
of KV memory among groups of layers. Does not know where the weights came from (`loading`). The
runtime asks for the layout before it makes pools; executors bind a model to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock.core.block import KVLayout
from penstock.core.errors import StartupFailed
from penstock.engine.decoder import group_layers
from penstock.engine.device import CPU, Device

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch
    from penstock.engine.kernels import Kernels


class Forward(Protocol):
    """A model that computes logits from batches over block pools."""

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """What each layer attends to."""

    def bind(self, kernels: Kernels, pools: Sequence[Tensor]) -> Callable[[Batch], Tensor]:
        """Return what computes logits `[R, vocab_size]` float32 of batches with KV in `pools`."""

    def with_windows_below(self, limit: int) -> Forward:
        """Return the same model with no window above `limit`, weights shared."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedModel:
    """A model ready to be bound to pools. `description` says what runs it, and how well."""

    name: str
    identity: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    description: str
    forward: Forward
    kernels: Kernels
    device: Device = CPU

    def layout(self, block_size: int) -> KVLayout:
        """Return the shape of this model's KV blocks."""
        return layout_of(self.forward, self.identity, self.dtype, block_size)


def num_blocks(
    layout: KVLayout, kv_cache_bytes: int, *, max_num_seqs: int, max_num_batched_tokens: int
) -> tuple[int, ...]:
    """Split a worker's KV memory among the groups; return the blocks of each.

    Every group gets the same number of blocks, for each keeps the same tokens, save that layers
    with a sliding window get no more than what all sequences together can see: the others get more.

    Raises: `StartupFailed` when there is not a block for each group.
    """
    limits = [
        max_num_seqs * (layout.num_blocks(group.window + max_num_batched_tokens) + 1)
        if group.window
        else kv_cache_bytes
        for group in layout.groups
    ]
    sizes = layout.block_bytes
    open_groups, counts = set(range(len(limits))), [0] * len(limits)
    while open_groups:
        spent = sum(counts[g] * sizes[g] for g in range(len(limits)) if g not in open_groups)
        share = (kv_cache_bytes - spent) // sum(sizes[g] for g in open_groups)
        full = {g for g in open_groups if limits[g] <= share}
        for group in full or open_groups:
            counts[group] = min(share, limits[group])
        open_groups -= full or open_groups
    if min(counts) < 1:
        raise StartupFailed(
            f"--kv-cache-bytes {kv_cache_bytes} does not hold one block of {layout.block_size} "
            f"tokens ({sum(sizes)} bytes): give the KV cache more memory"
        )
    return tuple(counts)


def layout_of(forward: Forward, identity: str, dtype: str, block_size: int) -> KVLayout:
    """Return the shape of a model's KV blocks.

    Raises: `StartupFailed` when its layers differ in that shape.
    """
    attention = forward.attention
    shapes = {(spec.num_kv_heads, spec.head_dim) for spec in attention}
    if len(shapes) > 1:
        raise StartupFailed("models whose layers differ in KV heads or head size are not supported")
    num_kv_heads, head_dim = shapes.pop()
    groups = group_layers([spec.window for spec in attention])
    return KVLayout(identity, groups, num_kv_heads, head_dim, block_size, dtype)
