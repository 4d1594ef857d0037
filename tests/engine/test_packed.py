"""Packed modules compute the same, and nothing that shares a weight is packed."""

import torch
from torch import nn

from penstock.engine.packed import PackedLinear, pack_linears


class Model(nn.Module):
    """An embedding with a tied head, linear modules at two depths, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False))
        self.odd = nn.Bilinear(16, 16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.embedding(ids))
        return self.head(self.odd(x, x) @ self.inner[2].weight @ self.inner[0].weight)


@torch.inference_mode()
def test_the_exchange_changes_no_result() -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(10).view(2, 5)
    wanted = model(ids)
    weights = [module.weight.clone() for module in (model.inner[0], model.inner[2])]
    pack_linears(model)
    assert isinstance(model.inner[0], PackedLinear)
    assert isinstance(model.inner[2], PackedLinear)
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embedding.weight
    for module, weight in zip((model.inner[0], model.inner[2]), weights, strict=True):
        assert torch.equal(module.weight, weight)
        assert (module.out_features, module.in_features) == weight.shape
    torch.testing.assert_close(model(ids), wanted)
