"""Own the device that the tests of Triton kernels run on: a GPU, or the interpreter on the CPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _no_traps() -> Iterator[None]:
    """Let the interpreter's numpy compute infinities without a word, as a GPU does."""
    with np.errstate(all="ignore"):
        yield
