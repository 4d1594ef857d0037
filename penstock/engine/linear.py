"""Linear layers of a frozen model, with weights laid out for the machine.

A `Linear` is loaded once, in the host process, and its packed weight is shared by the workers that
are forked from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class Linear:
    """A product with a constant weight, `x @ weight.T + bias`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> None:
        """Take a weight `[out_features, in_features]` and a bias `[out_features]`.

        `out_dtype` is the weight's unless given; float32 keeps a head's logits unrounded.
        """
        self.out_features, self.in_features = weight.shape
        self.out_dtype = out_dtype or weight.dtype
        self._weight, self._bias = weight, bias

    @classmethod
    def stacked(cls, *parts: tuple[Tensor, Tensor | None]) -> Self:
        """Return one product for several weights over the same input, its outputs side by side."""
        weights = [weight for weight, _ in parts]
        biases = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in parts
        ]
        has_bias = any(bias is not None for _, bias in parts)
        return cls(torch.cat(weights), torch.cat(biases) if has_bias else None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` in `out_dtype`."""
        return functional.linear(x, self._weight, self._bias).to(self.out_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows `[len(ids), in_features]` of the weight: the embedding of a tied head."""
        return functional.embedding(ids, self._weight)
