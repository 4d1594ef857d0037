"""Checks of the installation: Python, packages, compiler, compiled code, keys, the built-in model.

Versions are compared with what the package itself declares. What needs torch is asked in a process
of its own (`engine.py`), so that a broken torch is a finding and not the end of the doctor.
"""

import importlib.metadata
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from penstock.cli.checks.finding import Extent, Finding, failed, ok, warning
from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.errors import BackendUnavailable, StartupFailed
from penstock.native.build import build, plan_build
from penstock.transport.key import VARIABLE, cluster_key
from penstock.transport.native.library import TRANSPORT

ENGINE_DEADLINE_S: Final = 120.0
SHOWN: Final = ("torch", "transformers")
"""Packages with a line of their own; others are named when something is wrong with them."""

Version = tuple[int, ...]


def check_python(_extent: Extent) -> Iterator[Finding]:
    """Compare Python and every package with the ranges that are supported."""
    try:
        python, requirements = _declared()
    except (OSError, KeyError, importlib.metadata.PackageNotFoundError) as error:
        yield warning(
            "packages",
            f"supported versions are not known: {error}",
            "install Penstock: pip install -e .",
        )
        return
    found = platform.python_version()
    if is_within(found, python):
        yield ok("python", f"{found} (supported: {python})")
    else:
        yield failed("python", f"{found} is not supported", f"use Python {python}")
    yield from _check_packages(requirements)


def check_engine(extent: Extent) -> Iterator[Finding]:
    """Really import torch and transformers, and build or load the kernels of the model."""
    if extent.is_quick:
        return
    command = [sys.executable, "-P", "-m", "penstock.cli.checks.engine"]
    path = os.pathsep.join(filter(None, [str(_source()), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ENGINE_DEADLINE_S,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield failed("engine", f"torch did not load within {ENGINE_DEADLINE_S:.0f} s", _REINSTALL)
        return
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield failed("engine", f"torch or transformers cannot be imported: {last}", _REINSTALL)
        return
    yield from _engine_findings(json.loads(done.stdout.splitlines()[-1]))


def check_transport_library(extent: Extent) -> Iterator[Finding]:
    """Build or find the compiled transport."""
    try:
        plan = plan_build(TRANSPORT)
        if not plan.is_built and extent.is_quick:
            yield ok(
                "native transport", f"not built yet; built on first use with {plan.command[0]}"
            )
            return
        path = build(TRANSPORT)
    except BackendUnavailable as error:
        yield warning(
            "native transport",
            "none: Python moves the blocks, several times slower where they are scattered",
            str(error),
        )
        return
    yield ok("native transport", f"built with {plan.command[0]}, kept in {shown(path)}")


def check_key(_extent: Extent) -> Iterator[Finding]:
    """Look at the cluster key, which TCP between workers or programs needs."""
    try:
        cluster_key()
    except StartupFailed as error:
        yield warning(
            "cluster key",
            f"{error}",
            f"only TCP needs it: mend the file, or set {VARIABLE} to 16 characters or more",
        )
        return
    where = f"from {VARIABLE}" if VARIABLE in os.environ else "in a file of this user's alone"
    yield ok("cluster key", where)


def check_model(_extent: Extent) -> Iterator[Finding]:
    """Look whether the built-in model came with the installation whole."""
    path = BUILTIN_MODEL / "model.safetensors"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(header_bytes)) if header_bytes < size else None
    except (OSError, struct.error, ValueError) as error:
        yield failed("built-in model", f"{path.name} cannot be read: {error}", _REINSTALL_PENSTOCK)
        return
    if header is None or size != 8 + header_bytes + _data_bytes(header):
        yield failed("built-in model", f"{path.name} is not whole", _REINSTALL_PENSTOCK)
    else:
        yield ok("built-in model", f"{size / 1e6:.1f} MB of weights")


# ------------------------------------------------------------------------------------- versions


def is_within(version: str, ranges: str) -> bool:
    """Tell whether a version fits ranges such as `>=2.11,<2.14`; an unknown operator fits."""
    found = as_version(version)
    for part in filter(None, (part.strip() for part in ranges.split(","))):
        match = re.match(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", part)
        if match is None:
            continue
        bound = as_version(match[2])
        width = max(len(found), len(bound))
        left, right = (v + (0,) * (width - len(v)) for v in (found, bound))
        if not {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "!=": left != right,
            ">": left > right,
            "<": left < right,
        }[match[1]]:
            return False
    return True


def as_version(text: str) -> Version:
    """Return the leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def shown(path: Path) -> str:
    """Return a path as people write it."""
    home = str(Path.home())
    return "~" + str(path)[len(home) :] if str(path).startswith(home + os.sep) else str(path)


def _check_packages(requirements: list[str]) -> Iterator[Finding]:
    missing, wrong, count = [], [], 0
    for requirement in requirements:
        match = re.match(r"([\w.-]+)\s*([^;]*)", requirement)
        if match is None:
            continue
        name, ranges = match[1], match[2].strip()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}{ranges}")
            continue
        count += 1
        if not is_within(version, ranges):
            wrong.append(f"{name} {version} (supported: {ranges})")
        elif name in SHOWN:
            yield ok(name, f"{version} (supported: {ranges})")
    if missing or wrong:
        said = [f"missing: {', '.join(missing)}"] if missing else []
        said += [f"out of range: {', '.join(wrong)}"] if wrong else []
        yield failed("packages", "; ".join(said), _REINSTALL_PENSTOCK)
    else:
        yield ok("packages", f"all {count} that are needed are there")


def _declared() -> tuple[str, list[str]]:
    """Return the supported Python and the packages: of this checkout, or of what is installed."""
    project = _source() / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if table["name"] == "penstock":
            return table["requires-python"], table["dependencies"]
    distribution = importlib.metadata.distribution("penstock")
    needed = [line for line in distribution.requires or [] if "extra ==" not in line]
    return distribution.metadata["Requires-Python"], needed


def _source() -> Path:
    return Path(__file__).parents[3]


# ------------------------------------------------------------------------------------- the engine


def _engine_findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """Turn what `engine.py` said into findings."""
    yield ok("engine", f"torch and transformers load in {facts['import_s']:.1f} s; {facts['cpu']}")
    if facts["kernels"] is None:
        yield warning(
            "kernels", "none: the model runs on torch operations, several times slower",
            facts["kernels_error"],
        )  # fmt: skip
    elif not facts["has_openmp"]:
        yield warning(
            "kernels",
            "built without OpenMP: one thread for each worker",
            "install libomp (clang) or use g++ and delete the cached library",
        )
    else:
        yield ok("kernels", f"kept in {shown(Path(facts['kernels']))}", build_s=facts["build_s"])
    yield _gpu_finding(facts)


def _gpu_finding(facts: dict[str, Any]) -> Finding:
    """Say what torch sees; `gpu.py` says what there is."""
    if facts["gpus"]:
        return ok("torch on GPUs", ", ".join(facts["gpus"]))
    if Path("/dev/nvidia0").exists():
        return warning(
            "torch on GPUs",
            f"there is one, but torch {facts['torch']} does not see it",
            "install a CUDA build of torch that fits the driver, and look at CUDA_VISIBLE_DEVICES",
        )
    return ok("torch on GPUs", f"torch {facts['torch']} sees none")


def _data_bytes(header: dict[str, Any]) -> int:
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return max(ends, default=0)


_REINSTALL_PENSTOCK: Final = "install it again: pip install -e . (or pip install penstock)"
_REINSTALL: Final = "install torch again (on a machine without CUDA: its CPU build)"
