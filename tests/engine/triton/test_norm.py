"""Norms and residual sums by Triton against the torch reference, which is tested elsewhere."""

import pytest
import torch

from penstock.engine.kernels import Norm, NormKind
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.triton.norm import add_norm, norm_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
REFERENCE = ReferenceKernels()


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[result.dtype]
    torch.testing.assert_close(result.cpu(), expected, atol=tolerance, rtol=tolerance)


def make_norm(kind: NormKind, width: int, *, has_bias: bool = False, eps: float = 1e-5) -> Norm:
    weight = 1 + 0.3 * torch.randn(width)
    return Norm(kind, weight, eps, torch.randn(width) if has_bias else None)


def on(device: torch.device, norm: Norm) -> Norm:
    weight, bias = (part if part is None else part.to(device) for part in (norm.weight, norm.bias))
    return Norm(norm.kind, weight, norm.eps, bias)


@DTYPES
@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("width", [64, 200])
def test_norm(device, dtype, kind, width):
    torch.manual_seed(width)
    x = (3 * torch.randn(5, width) + 1).to(dtype)
    for norm in (make_norm(kind, width), make_norm(kind, width, has_bias=True)):
        normed = torch.full_like(x, float("nan"), device=device)
        norm_rows(x.to(device), on(device, norm), normed)
        close(normed, REFERENCE.norm(x, norm))


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_add_norm(device, dtype, scale):
    torch.manual_seed(1)
    wide = torch.randn(2, 4, 128).to(dtype)
    residual, delta = wide[0, :, :96], wide[1, :, 16:112]
    norm = make_norm(NormKind.RMS_LLAMA, 96)
    total, normed = (torch.full_like(wide[0], float("nan"), device=device) for _ in range(2))
    add_norm(
        residual.to(device), delta.to(device), scale, on(device, norm),
        total=total[:, :96], normed=normed[:, 32:],
    )  # fmt: skip
    expected = REFERENCE.add_norm(residual, delta, norm, scale)
    close(total[:, :96], expected[0])
    close(normed[:, 32:], expected[1])
    assert total[:, 96:].isnan().all()
    assert normed[:, :32].isnan().all()


def test_the_sum_may_take_the_place_of_the_residual(device):
    residual, delta = torch.randn(2, 3, 64)
    norm = Norm(NormKind.RMS, None, 1e-6)
    expected = REFERENCE.add_norm(residual, delta, norm)
    x, normed = residual.to(device), torch.empty(3, 64, device=device)
    add_norm(x, delta.to(device), 1.0, norm, total=x, normed=normed)
    close(x, expected[0])
    close(normed, expected[1])
