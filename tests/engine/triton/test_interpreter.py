"""The repaired interpreter rounds as torch does, which rounds as a GPU does."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")


@triton.jit
def _cast(source, target, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def _multiply(a, b, output):
    i = tl.arange(0, 16)
    places = i[:, None] * 16 + i[None, :]
    tl.store(output + places, tl.dot(tl.load(a + places), tl.load(b + places)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rounds_to_nearest_even(dtype):
    torch.manual_seed(0)
    numbers = torch.randn(4096) * 10 ** torch.randint(-8, 3, (4096,))
    numbers[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 0.0])
    numbers = numbers.clamp(-448, 448)
    target = torch.zeros(4096, dtype=dtype)
    _cast[(1,)](numbers, target, COUNT=4096)
    assert torch.equal(target.view(torch.uint8), numbers.to(dtype).view(torch.uint8))
    back = torch.zeros(4096)
    _cast[(1,)](target, back, COUNT=4096)
    assert torch.equal(back, target.float())


def test_multiplies_bfloat16():
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    output = torch.empty(16, 16)
    _multiply[(1,)](a, b, output)
    torch.testing.assert_close(output, a.float() @ b.float())
