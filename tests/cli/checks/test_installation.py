"""What is wrong with an installation is found."""

import shutil
from pathlib import Path

import pytest

from penstock.cli.checks import installation
from penstock.cli.checks.finding import Extent, State
from penstock.cli.checks.installation import (
    as_version,
    check_engine,
    check_model,
    check_python,
    check_transport_library,
    is_within,
)


@pytest.mark.parametrize(
    ("version", "ranges", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11", False),
        ("2.11", ">=2.11.0", True),
        ("5.17.0rc1", ">=5.17", True),
        ("1.4", "==1.4.0", True),
        ("1.4", "!=1.4", False),
        ("1.4", "<=1.3", False),
        ("1.4", ">1.4", False),
        ("1.4", "", True),
        ("1.4", "~=1.3", True),
    ],
)
def test_versions_in_ranges(version: str, ranges: str, fits: bool):
    assert is_within(version, ranges) is fits


def test_what_is_no_version():
    assert as_version("unknown") == ()


def test_this_installation_has_what_it_declares():
    found = {finding.name: finding for finding in check_python(Extent())}
    assert found["python"].state is State.OK
    assert found["packages"].state is State.OK
    assert "<2.14" in found["torch"].said


def test_missing_and_wrong_packages_are_named(monkeypatch):
    wanted = ["no-such-package>=1", "numpy>=99; python_version > '3'", "msgspec"]
    monkeypatch.setattr(installation, "_declared", lambda: (">=3.99", wanted))
    python, packages = check_python(Extent())
    assert python.state is State.FAILED
    assert packages.state is State.FAILED
    assert "missing: no-such-package>=1; out of range: numpy " in packages.said
    assert "pip install" in packages.advice


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = check_engine(Extent())
    assert finding.state is State.FAILED
    assert "libcudart.so.13: not found" in finding.said
    assert "install torch again" in finding.advice


def test_a_torch_that_takes_the_process_down_is_a_finding(monkeypatch, tmp_path: Path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = check_engine(Extent())
    assert "exit code -4" in finding.said


def test_kernels_without_a_compiler_or_without_threads(monkeypatch):
    facts = {
        "import_s": 1.0, "cpu": "AVX2, 2 threads", "gpus": [], "torch": "2.13", "build_s": 0.1,
        "kernels": None, "kernels_error": "install a compiler", "has_openmp": True,
    }  # fmt: skip
    states = [(f.name, f.state) for f in installation._engine_findings(facts)]
    assert states[:2] == [("engine", State.OK), ("kernels", State.WARNING)]
    facts |= {"kernels": "here.so", "has_openmp": False, "gpus": ["H200"]}
    _, kernels, gpu = installation._engine_findings(facts)
    assert "OpenMP" in kernels.said
    assert gpu.said == "H200"


def test_quick_compiles_nothing(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (finding,) = check_transport_library(Extent(is_quick=True))
    assert finding.state is State.OK
    assert "on first use" in finding.said or "g++" in finding.said
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("size", [0, 5, 4000, -1])
def test_a_model_that_is_not_whole_is_found(monkeypatch, tmp_path: Path, size: int):
    whole = installation.BUILTIN_MODEL / "model.safetensors"
    copied = tmp_path / "model.safetensors"
    shutil.copy(whole, copied)
    with copied.open("rb+") as file:
        file.truncate(size if size >= 0 else copied.stat().st_size - 1)
    monkeypatch.setattr(installation, "BUILTIN_MODEL", tmp_path)
    (finding,) = check_model(Extent())
    assert finding.state is State.FAILED
    copied.unlink()
    (finding,) = check_model(Extent())
    assert "No such file" in finding.said
