"""What the doctor says of GPUs, by a double of the driver's library, between real processes."""

import importlib.metadata

import pytest

from penstock.cli.checks import gpu
from penstock.cli.checks.finding import Extent, Finding, State
from penstock.core.types import GIB, MIB
from tests.transport.cuda_double import build_double

EXTENT = Extent(moved_bytes=2 * MIB, repetitions=2)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    return str(build_double(tmp_path_factory.mktemp("double")))


@pytest.fixture(autouse=True)
def _compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DOUBLE_DEVICES", "1")
    monkeypatch.setattr(gpu, "NVIDIA", tmp_path / "nvidia0")


def look(library: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in gpu.check_gpu(EXTENT, library)}


def test_without_a_gpu_one_line_says_what_is_missing(tmp_path):
    (finding,) = look("libno-such-cuda.so").values()
    assert (finding.name, finding.state) == ("gpu", State.OK)
    assert finding.said.endswith("libno-such-cuda.so cannot be loaded")
    (tmp_path / "nvidia0").touch()
    (finding,) = look("libno-such-cuda.so").values()
    assert finding.state is State.WARNING
    assert "install the driver" in finding.advice


def test_a_driver_without_devices_is_named(library, monkeypatch):
    monkeypatch.setenv("DOUBLE_DEVICES", "0")
    (finding,) = look(library).values()
    assert finding.said.endswith("cuInit says CUDA_ERROR_NO_DEVICE")


def test_memory_of_another_process_is_mapped_read_compared_and_measured(library):
    found = look(library)
    assert {finding.state for finding in found.values()} <= {State.OK, State.WARNING}
    assert found["gpu 0"].said == "double 0, 1 GiB"
    assert found["gpu 0"].figures["total_bytes"] == GIB
    assert found["triton"].state is State.OK
    assert found["cuda_ipc on 0"].state is State.OK
    assert found["cuda_ipc on 0"].figures["opening_s"] > 0
    assert found["cuda_ipc on 0, rate"].figures["bytes_per_s"] > 1e6


def test_wrong_bytes_are_seen(library, monkeypatch):
    real = gpu.contents

    def otherwise(num_blocks: int):
        blocks = real(num_blocks)
        blocks[1, 77] ^= 4
        return blocks

    monkeypatch.setattr(gpu, "contents", otherwise)
    found = look(library)
    assert found["cuda_ipc on 0"].state is State.FAILED
    assert "cuda_ipc on 0, rate" not in found


def test_what_keeps_two_processes_from_sharing_is_said(library, monkeypatch):
    monkeypatch.setenv("DOUBLE_EXPANDABLE", "1")
    finding = look(library)["cuda_ipc on 0"]
    assert finding.state is State.FAILED
    assert "expandable_segments" in finding.said
    assert "PID namespace" in finding.advice


@pytest.mark.parametrize(
    ("version", "interprets", "said"),
    [("3.2.0", "0", "too old"), ("3.9.0+git1", "1", "interpret"), (None, "0", "not installed")],
)
def test_kernels_that_cannot_be_compiled(monkeypatch, version, interprets, said):
    def version_of(_name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError("triton")
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    finding = gpu._triton_finding()
    assert finding.state is State.WARNING
    assert said in finding.said
