"""Own the fixtures that any test may ask for; know nothing of Penstock itself.

Torch is imported only where a collected test is marked `gpu`, so a test of the pure set starts in
milliseconds.
"""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.leaks import leak_check, mark_descendants

LEAK_CHECKED_FOLDERS = {"cluster", "faults"}

# Nothing that a test needs is downloaded; a look-up that leaves the machine is a failure.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files run side by side, a process a core: a second thread of OpenMP would spin where another file
# computes, and one that a test asks for sleeps while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# Without a GPU, Triton's kernels run in its interpreter on CPU tensors; it decides when it is first
# imported, by whatever test comes first. With one, the same tests run on the device.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine stalls for longer than any sensible deadline per example. In CI the same commit
# tries the same examples; elsewhere each run looks for new ones.
settings.register_profile("penstock", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("penstock")


def pytest_configure() -> None:
    """Make a worker that outlives its parent visible to the leak check, and Ctrl-C heard.

    A shell ignores it for what it runs in the background, and so would all that a test starts.
    """
    mark_descendants()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch finds no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process or a shared-memory segment behind."""
    with leak_check():
        yield


@pytest.fixture(autouse=True)
def _no_leaks_by_folder(request: pytest.FixtureRequest) -> None:
    """Ask for `no_leaks` on behalf of every test in a folder that starts workers."""
    if _is_leak_checked(request.path):
        request.getfixturevalue("no_leaks")


@pytest.fixture(autouse=True, scope="module")
def _no_leaks_by_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check once more around a whole file: a cluster shared by its tests outlives each of them."""
    if _is_leak_checked(request.path):
        with leak_check():
            yield
    else:
        yield


def _is_leak_checked(path: Path) -> bool:
    folder = path.relative_to(Path(__file__).parent).parts[0]
    return folder in LEAK_CHECKED_FOLDERS
