"""Puts packed products in the place of `nn.Linear` in Hugging Face modules that run as they are.

Owns nothing but that exchange. On a CPU it makes decoding about twice as fast; a module that is not
an `nn.Linear`, or shares its weight with another, stays. `lift` and `HuggingFaceModel` call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from penstock.engine.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` did. Its plain weight is made anew for code that asks for it."""

    def __init__(self, module: nn.Linear) -> None:
        """Take over a module's weight, which the caller then lets go."""
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        bias: Tensor | None = module.bias
        self.bias = None if bias is None else bias.detach()
        self._linear = Linear(module.weight.detach(), self.bias)

    @property
    def weight(self) -> Tensor:
        """The plain weight, a copy that is made once."""
        return self._linear.table

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`."""
        return self._linear(x)


def pack_linears(model: nn.Module) -> None:
    """Exchange every linear module below `model`, one after the other."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # A subclass may compute something else; a tied head has a table for its weight.
            if type(child) is nn.Linear and owners[id(child.weight)] == 1:
                setattr(module, name, PackedLinear(child))
