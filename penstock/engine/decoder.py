"""A decoder as flat records of packed weights, and the one forward that runs every declared one.

Owns the order of operations. Does not know Hugging Face (`lift` fills in the records), how an
operation is computed (`Kernels`), or whose tokens it runs. A loaded model owns one; executors bind
it to their KV pools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock.core.block import KVGroup
from penstock.engine.kernels import Activation, HeadsSpec, Kernels, Norm
from penstock.engine.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch

Cache = tuple["Tensor", "Tensor"]
"""Keys and values of a layer: views `[num_blocks, block_size, num_kv_heads, head_dim]`."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseMlp:
    """`down(activation(gate) * up)`, or without a gate `down(activation(up))`."""

    gate_up: Linear
    down: Linear
    activation: Activation
    is_gated: bool


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueMlp:
    """A block that stays as it came, rows `[T, width]` to rows: a mixture of experts.

    `is_capturable` where it never waits for the device: such a one can be in a CUDA graph.
    """

    function: Callable[[Tensor], Tensor]
    is_capturable: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer. `heads.attention` says where its KV lies. A parallel layer has no `mlp_norm`."""

    attention_norm: Norm | None
    qkv: Linear
    heads: HeadsSpec
    attention_output: Linear
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp: DenseMlp | OpaqueMlp
    mlp_output_norm: Norm | None
    is_parallel: bool
    residual_multiplier: float


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A whole decoder. `embedding` is the head itself when the two are tied."""

    embedding: Tensor | Linear
    embedding_scale: float
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    logits_scale: float
    logits_softcap: float

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """What each layer attends to."""
        return tuple(layer.heads.attention for layer in self.layers)

    def bind(self, kernels: Kernels, pools: Sequence[Tensor]) -> Callable[[Batch], Tensor]:
        """Return what computes logits `[R, vocab_size]` float32 of batches with KV in `pools`."""
        caches = cache_views(self.attention, pools)

        def forward(kernels: Kernels, batch: Batch) -> Tensor:
            return _forward(self, caches, kernels, batch)

        return kernels.prepare(forward)

    def with_windows_below(self, limit: int) -> Decoder:
        """Return the same decoder with no window above `limit`, weights shared."""
        layers = (
            replace(layer, heads=replace(layer.heads, attention=shortened))
            for layer, shortened in zip(
                self.layers, windows_below(limit, self.attention), strict=True
            )
        )
        return replace(self, layers=tuple(layers))


def _forward(decoder: Decoder, caches: Sequence[Cache], kernels: Kernels, batch: Batch) -> Tensor:
    """Return logits of the batch's `logits_rows`. Branches depend on the model: see `Kernels`."""
    layers = decoder.layers
    x = kernels.embed(decoder.embedding, batch, decoder.embedding_scale)
    normed = _norm(kernels, x, layers[0].attention_norm)
    next_norms = [*(layer.attention_norm for layer in layers[1:]), decoder.final_norm]
    for layer, cache, next_norm in zip(layers, caches, next_norms, strict=True):
        attended = _attend(kernels, layer, normed, cache, batch)
        if layer is layers[-1]:
            # What follows the last attention is wanted of a few rows: of none in a prefill chunk.
            attended, x = kernels.select_rows(attended, batch), kernels.select_rows(x, batch)
            if layer.is_parallel:
                normed = kernels.select_rows(normed, batch)
        x, normed = _finish(kernels, layer, x, normed, attended, next_norm)
    logits = kernels.linear(decoder.head, normed)
    return kernels.cap(logits, decoder.logits_scale, decoder.logits_softcap)


def _attend(kernels: Kernels, layer: Layer, normed: Tensor, cache: Cache, batch: Batch) -> Tensor:
    query = kernels.heads(layer.heads, kernels.linear(layer.qkv, normed), *cache, batch)
    return kernels.attend(layer.heads.attention, query, *cache, batch)


def _finish(
    kernels: Kernels,
    layer: Layer,
    x: Tensor,
    normed: Tensor,
    attended: Tensor,
    next_norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """Run a layer from its attention's output on; return the residual stream and its next norm."""
    delta = _norm(
        kernels, kernels.linear(layer.attention_output, attended), layer.attention_output_norm
    )
    if layer.is_parallel:
        x = kernels.add(x, delta, layer.residual_multiplier)
    else:
        x, normed = _add_norm(kernels, x, delta, layer.mlp_norm, layer.residual_multiplier)
    delta = _norm(kernels, _mlp(kernels, layer.mlp, normed), layer.mlp_output_norm)
    return _add_norm(kernels, x, delta, next_norm, layer.residual_multiplier)


def _mlp(kernels: Kernels, mlp: DenseMlp | OpaqueMlp, x: Tensor) -> Tensor:
    if isinstance(mlp, OpaqueMlp):
        return kernels.apply(mlp.function, x)
    inner = kernels.activate(kernels.linear(mlp.gate_up, x), mlp.activation, gated=mlp.is_gated)
    return kernels.linear(mlp.down, inner)


def _norm(kernels: Kernels, x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else kernels.norm(x, norm)


def _add_norm(
    kernels: Kernels, x: Tensor, delta: Tensor, norm: Norm | None, scale: float
) -> tuple[Tensor, Tensor]:
    if norm is None:
        x = kernels.add(x, delta, scale)
        return x, x
    return kernels.add_norm(x, delta, norm, scale)


def cache_views(attention: Sequence[AttentionSpec], pools: Sequence[Tensor]) -> tuple[Cache, ...]:
    """Return each layer's keys and values as views of the block-major pools."""
    planes = [pools[spec.group][:, spec.layer_in_group] for spec in attention]
    return tuple((plane[:, 0], plane[:, 1]) for plane in planes)


def group_layers(windows: Sequence[int]) -> tuple[KVGroup, ...]:
    """Put layers with the same window in one group, in order of first appearance; 0 is none."""
    groups: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        groups.setdefault(window, []).append(layer)
    return tuple(KVGroup(tuple(layers), window) for window, layers in groups.items())


def place_layers(groups: Sequence[KVGroup]) -> list[tuple[int, int]]:
    """Return for every layer its group and its plane in that group's blocks."""
    places = {
        layer: (index, plane)
        for index, group in enumerate(groups)
        for plane, layer in enumerate(group.layers)
    }
    return [places[layer] for layer in sorted(places)]


def windows_below(limit: int, attention: Sequence[AttentionSpec]) -> list[AttentionSpec]:
    """Return the specs with windows of at most `limit`; full attention stays full."""
    return [replace(spec, window=min(spec.window, limit)) for spec in attention]
