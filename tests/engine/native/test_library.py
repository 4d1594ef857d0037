"""What happens where the kernels cannot be built: loudly, and still with the right numbers."""

import pytest
import torch

from penstock.engine.device import CPU
from penstock.engine.kernels.select import select_kernels
from penstock.engine.linear import Linear, Packing
from penstock.engine.native.library import load_library


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """Take the compiler and the cache away from this process."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_loads_once():
    loaded = load_library()
    assert loaded.notice is None
    assert load_library() is loaded


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_warns_once_and_runs_on_torch():
    with pytest.warns(RuntimeWarning, match=r"no-such-compiler.*install a C\+\+17 compiler"):
        kernels = select_kernels(CPU, torch.bfloat16)
    assert kernels.name == "reference"
    assert "several times slower" in kernels.notice
    assert "apt install g++" in kernels.notice
    # The second time it is known; a warning now would be an error here.
    assert select_kernels(CPU, torch.bfloat16).notice == kernels.notice
    layer = Linear(torch.ones(8, 4))
    assert layer.packing is not Packing.NATIVE
    assert torch.equal(kernels.linear(layer, torch.ones(2, 4)), torch.full((2, 8), 4.0))
