"""Activations by Triton against float64."""

import pytest
import torch

from penstock.engine.kernels import Activation
from penstock.engine.triton.activate import activate

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("gated", [True, False])
def test_activate(device, dtype, activation, gated):
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 2 * 1100)).to(dtype)
    x = x if gated else x[:, :1100]
    # Large ones neither overflow nor become NaN.
    x[0, 0], x[0, 1] = 300.0, -300.0
    output = torch.full((3, 1100), float("nan"), dtype=dtype, device=device)
    activate(x.to(device), activation, output, gated=gated)
    gate, up = x.double().chunk(2, -1) if gated else (x.double(), 1.0)
    functions = {
        Activation.SILU: torch.nn.functional.silu,
        Activation.GELU: torch.nn.functional.gelu,
        Activation.GELU_TANH: lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        Activation.RELU: torch.relu,
        Activation.RELU2: lambda v: torch.relu(v).square(),
    }
    expected = (functions[activation](gate) * up).to(dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.cpu(), expected, atol=tolerance, rtol=tolerance)
