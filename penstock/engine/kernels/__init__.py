"""The operations that a flat decoder is written in, behind one protocol.

Owns the description of norms, rotary embeddings and activations, and the protocol `Kernels`. Does
not know the model: the decoder says what to compute in which order. Variants: `reference` (torch
operations, any device and dtype) and `cpu` (C++, fused; see `penstock/engine/native`).

A decoder is a function `forward(kernels, batch) -> logits` that calls the methods below. `prepare`
turns it into what runs it fastest. The native back end records the calls once and then runs all of
them in a single native call, so a forward must follow three rules:

1. What a method returns is passed on to other methods and used for nothing else: no torch
   operation, no `.shape`, no branch on it. What no method covers goes through `apply`.
2. Branches depend on the model only, never on the batch; `batch` is handed on unopened.
3. Norms, linears, specs, tables and caches are the same objects on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from penstock.engine.attention import AttentionBackend, AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch
    from penstock.engine.linear import Linear


class NormKind(Enum):
    """Formula of a norm, rounding included.

    RMS        `(x / rms(x)) * weight`, rounded once at the end (Gemma: fold "+ 1" into the weight)
    RMS_LLAMA  `round(x / rms(x)) * weight`: rounded before the product and after it
    LAYER      `(x - mean) / std * weight + bias`, rounded once
    """

    RMS = 0
    RMS_LLAMA = 1
    LAYER = 2


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm over the last dimension.

    `weight` and `bias` are `[width]`, float32 or in the activations' dtype, or None.
    """

    kind: NormKind
    weight: Tensor | None
    eps: float
    bias: Tensor | None = None


class Activation(Enum):
    """Activation of an MLP."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Rotary embedding by table: `cos` and `sin` are `[max_positions, rotary_dim / 2]` float32.

    Any scaling of the angles or of the amplitude is in the tables. The first `rotary_dim` elements
    of a head are turned; element i pairs with i + rotary_dim / 2, or, when `interleaved`, 2i with
    2i + 1.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class HeadsSpec:
    """Say what happens to a QKV row before attention.

    A row is `[query heads | key heads | value heads]`. A query or key norm's weight is `[head_dim]`
    (shared by the heads), or `[heads * head_dim]`: then it is one norm over the whole row when
    `norm_spans_heads` (OLMo 2), else one per head with a weight of its own (Cohere).
    """

    attention: AttentionSpec
    rotary: Rotary | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norm_spans_heads: bool = False
    norm_after_rotary: bool = False


class Kernels(AttentionBackend, Protocol):
    """Computes the parts of a decoder. T rows; widths in elements; every result is contiguous.

    Nothing is changed in place save the KV caches.
    """

    @property
    def notice(self) -> str | None:
        """What is slower than it could be and what to install, or None; for `doctor`."""

    def embed(self, table: Tensor | Linear, batch: Batch, scale: float = 1.0) -> Tensor:
        """Return the rows of the table `[vocab, width]` for the batch's tokens, times `scale`.

        A `Linear` (a tied head) serves as its own table, so that its weight is kept once.
        """

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the norm of every row."""

    def add(self, residual: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
        """Return `residual + scale * delta`."""

    def add_norm(
        self, residual: Tensor, delta: Tensor, norm: Norm, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the sum as `add` does, rounded, and the norm of the rounded sum."""

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, `[T, out_features]`."""

    def heads(
        self,
        spec: HeadsSpec,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Norm and turn queries and keys, store keys and values; return the queries.

        `qkv` is `[T, (num_heads + 2 * num_kv_heads) * head_dim]`; caches are as in `attend`. The
        result, `[T, num_heads, head_dim]`, goes to `attend` as it is, and what `attend` returns
        goes to `linear` as it is (rows are flattened there).
        """

    def activate(self, x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
        """Return `f(x)`, or when gated, for `x` `[T, 2n]`, `f(x[:, :n]) * x[:, n:]`."""

    def select_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the rows `[R, width]` that need logits."""

    def cap(self, x: Tensor, scale: float, softcap: float) -> Tensor:
        """Return `scale * x` in float32, bent by `softcap * tanh(. / softcap)` if softcap."""

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `function(x)`: torch code from rows `[T, n]` to rows of the same width and dtype.

        A mixture of experts, say.
        """

    def prepare(self, forward: Callable[[Kernels, Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Return what computes `forward(self, batch)`, usually faster.

        Call it once the KV caches have their place.
        """
