"""The decoder's operations in plain torch: the yardstick of the other back ends, the fallback.

Any device and dtype. Norms and rotary embeddings are computed in float32 and rounded where
`NormKind` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.kernels import Activation, HeadsSpec, Kernels, Norm, NormKind, Rotary
from penstock.engine.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch


class ReferenceKernels(ReferenceAttention):
    """Implements `Kernels` with torch operations.

    `notice` says why, where something faster was expected.
    """

    def __init__(self, notice: str | None = None) -> None:
        self.notice = notice

    def embed(self, table: Tensor | Linear, batch: Batch, scale: float = 1.0) -> Tensor:
        """Return the embeddings of the batch's tokens; see `Kernels.embed`."""
        ids = batch.token_ids
        rows = table.rows(ids) if isinstance(table, Linear) else functional.embedding(ids, table)
        return rows if scale == 1.0 else (rows.float() * scale).to(rows.dtype)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the norm of every row; see `NormKind`."""
        return normalise(x, norm.kind, norm.eps, norm.weight, norm.bias)

    def add(self, residual: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
        """Return `residual + scale * delta`, computed in float32."""
        return (residual.float() + scale * delta.float()).to(residual.dtype)

    def add_norm(
        self, residual: Tensor, delta: Tensor, norm: Norm, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm."""
        total = self.add(residual, delta, scale)
        return total, self.norm(total, norm)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`; rows are flattened."""
        return linear(x.flatten(1))

    def heads(
        self,
        spec: HeadsSpec,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Norm and turn queries and keys, store keys and values; see `Kernels.heads`."""
        shape = spec.attention
        num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
        rows = qkv.view(-1, shape.num_heads + 2 * num_kv_heads, head_dim)
        query = _norm_and_turn(rows[:, : shape.num_heads], spec.query_norm, spec, batch)
        key = _norm_and_turn(rows[:, shape.num_heads : -num_kv_heads], spec.key_norm, spec, batch)
        self.store(key, rows[:, -num_kv_heads:], key_cache, value_cache, batch.slots[shape.group])
        return query.contiguous()

    def activate(self, x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
        """Return the activation, computed in float32 and rounded once."""
        gate, up = x.float().chunk(2, -1) if gated else (x.float(), None)
        value = _ACTIVATIONS[activation](gate)
        return (value if up is None else value * up).to(x.dtype)

    def select_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the rows that need logits."""
        return x[batch.logits_rows]

    def cap(self, x: Tensor, scale: float, softcap: float) -> Tensor:
        """Return scaled and capped logits in float32."""
        logits = x.float() * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `function(x)`."""
        return function(x)

    def prepare(self, forward: Callable[[Kernels, Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Return the forward itself, bound to these kernels."""

        def run(batch: Batch) -> Tensor:
            with torch.inference_mode():
                return forward(self, batch)

        return run


def normalise(
    x: Tensor, kind: NormKind, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the norm over the last dimension, rounded as `kind` says."""
    wide = x.float()
    if kind is NormKind.LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind is NormKind.RMS_LLAMA:
        wide = wide.to(x.dtype).float()
    if weight is not None:
        wide = wide * weight.float()
    if bias is not None:
        wide = wide + bias.float()
    return wide.to(x.dtype)


def rotate(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """Turn heads `[T, heads, head_dim]` to their positions, in float32."""
    cos, sin = rotary.cos[positions][:, None], rotary.sin[positions][:, None]
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if rotary.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(parts, -1).flatten(-2) if rotary.interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _norm_and_turn(x: Tensor, norm: Norm | None, spec: HeadsSpec, batch: Batch) -> Tensor:
    """Apply the head norm and the rotary embedding in the order that the spec gives."""
    if norm is not None and not spec.norm_after_rotary:
        x = _norm_heads(x, norm, spans_heads=spec.norm_spans_heads)
    if spec.rotary is not None:
        x = rotate(x, spec.rotary, batch.positions)
    if norm is not None and spec.norm_after_rotary:
        x = _norm_heads(x, norm, spans_heads=spec.norm_spans_heads)
    return x


def _norm_heads(x: Tensor, norm: Norm, *, spans_heads: bool) -> Tensor:
    if spans_heads:
        return normalise(x.flatten(1), norm.kind, norm.eps, norm.weight, norm.bias).view(x.shape)
    weight, bias = (
        None if part is None else part.view(-1, x.shape[-1]) for part in (norm.weight, norm.bias)
    )
    return normalise(x, norm.kind, norm.eps, weight, bias)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
    Activation.RELU2: lambda x: functional.relu(x).square(),
}
