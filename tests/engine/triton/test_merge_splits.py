"""Parts of attention are put together as their softmax would have been, in float64."""

import pytest
import torch

from penstock.engine.triton.merge_splits import merge_splits


@pytest.mark.parametrize(("splits", "head_dim"), [(2, 16), (8, 80), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_weighted_by_their_sums(device, splits, head_dim, dtype):
    generator = torch.Generator().manual_seed(splits)
    partial = torch.randn(splits, 5, 3, head_dim, generator=generator)
    lse = 9 * torch.randn(splits, 5, 3, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.4] = float("-inf")
    lse[:, 2] = float("-inf")  # a row that nobody has a part of
    partial[lse == float("-inf")] = float("nan")  # and what is not read
    weights = (lse.double() * torch.log(torch.tensor(2.0).double())).softmax(0).nan_to_num()
    wanted = (weights[..., None] * partial.double().nan_to_num()).sum(0)
    output = torch.full((9, 3, head_dim), 7.0, dtype=dtype, device=device)
    starts = torch.tensor([2, 3, 6], dtype=torch.int32, device=device)
    merge_splits(partial.to(device), lse.to(device), output, starts)
    found = output.cpu().double()
    # Rows of the sequences, [2, 6), from the first of the parts on; others stay as they are.
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found[2:6], wanted[:4], rtol=tolerance, atol=tolerance)
    assert (found[2 + 2] == 0.0).all()
    assert (found[:2] == 7.0).all()
    assert (found[6:] == 7.0).all()
