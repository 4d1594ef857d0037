"""Compiles a folder of C++ sources into a library, once per machine, source and compiler.

Owns the compiler's command line and the cache of results, and knows nothing of what the code does.
The name of a cached library is a hash of everything that its code depends on, so a stale one is
never loaded. Processes that start together build once: the first takes a lock, the others wait for
it. `penstock.engine.native.library` and `penstock.transport.native` call it on first use.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from penstock.core.errors import BackendUnavailable

_COMPILERS: Final = ("c++", "g++", "clang++")
_DEADLINE_S: Final = 300.0
_ADVICE: Final = (
    "install a C++17 compiler (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`) "
    "or name one in the environment variable CXX"
)
# The kernels compute with infinities (masks) and add in a fixed order, so no -ffast-math.
_FLAGS: Final = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-psabi", "-w",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to build: all C++ files of a folder. `title` is what people are told it is."""

    name: str
    title: str
    folder: Path
    is_parallel: bool = False
    """Whether the code asks for OpenMP; it gets it where the compiler has it."""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """How a recipe is built on this machine, and where the result is, or will be, kept."""

    command: tuple[str, ...]
    target: Path

    @property
    def is_built(self) -> bool:
        """True when nothing has to be compiled."""
        return self.target.exists()


def plan_build(recipe: Recipe) -> BuildPlan:
    """Say what `build` would do; compiles nothing.

    Raises: `BackendUnavailable` when there is no compiler or the cache cannot be used.
    """
    compiler = find_compiler()
    command = [compiler, *_FLAGS, *_machine_flags()]
    if recipe.is_parallel:
        command += _openmp_flags(compiler, recipe.title)
    name = f"{recipe.name}-{_fingerprint(command, recipe.folder)}.so"
    return BuildPlan(tuple(command), _cache_folder() / name)


def build(recipe: Recipe, on_progress: Callable[[str], None] = logger.info) -> Path:
    """Return the compiled library, from the cache when it is there.

    Raises: `BackendUnavailable` when there is no compiler, the compiler fails or the cache cannot
    be written; the message says what to do.
    """
    plan = plan_build(recipe)
    compiler, target = plan.command[0], plan.target
    if plan.is_built:
        return target
    with _lock(target.with_name(f"{recipe.name}.lock")):
        if not plan.is_built:
            start = time.monotonic()
            on_progress(f"compiling {recipe.title} with {compiler} (once on this machine)")
            _compile(list(plan.command), recipe, target)
            on_progress(f"compiled {recipe.title} in {time.monotonic() - start:.1f} s: {target}")
    return target


def find_compiler() -> str:
    """Return the path of the C++ compiler: CXX if it is set, else the first of the usual names.

    Raises: `BackendUnavailable` when there is none.
    """
    named = os.environ.get("CXX")
    candidates = (named,) if named else _COMPILERS
    for name in candidates:
        if path := shutil.which(name):
            return path
    missing = f"CXX names {named}, which is not there" if named else "there is no C++ compiler"
    raise BackendUnavailable(f"{missing}: {_ADVICE}")


def _machine_flags() -> tuple[str, ...]:
    return ("-mcpu=native",) if platform.machine() in {"aarch64", "arm64"} else ("-march=native",)


def _openmp_flags(compiler: str, title: str) -> tuple[str, ...]:
    """Return the flags for threads; none, with a warning, where OpenMP is missing."""
    probe = [compiler, "-fopenmp", "-x", "c++", "-shared", "-fPIC", "-", "-o", os.devnull]
    if _run(probe, "#include <omp.h>\n").returncode == 0:
        return ("-fopenmp",)
    logger.warning("%s has no OpenMP: %s will use one thread each", compiler, title)
    return ()


def _fingerprint(command: list[str], folder: Path) -> str:
    """Hash all that decides what code comes out, and the CPU, because -march=native asks for it."""
    digest = blake2b(digest_size=10)
    for part in (*command, _run([command[0], "--version"]).stdout, _cpu()):
        digest.update(part.encode() + b"\0")
    for source in sorted(folder.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.startswith(wanted))


def _cache_folder() -> Path:
    """Return the folder for compiled code: this user's alone, because it gets executed."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(root) / "penstock" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BackendUnavailable(
            f"compiled code cannot be kept in {folder} ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BackendUnavailable(
            f"{folder} can be written by others, so nothing in it is loaded: make it yours "
            "(`chmod 700`) or set XDG_CACHE_HOME to another folder"
        )
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel frees it when a process dies.

    Raises: `BackendUnavailable` when another process holds it for longer than a build may take.
    """
    deadline = time.monotonic() + _DEADLINE_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BackendUnavailable(f"another process has held {path} too long") from None
                time.sleep(0.05)
        yield


def _compile(command: list[str], recipe: Recipe, target: Path) -> None:
    """Compile all files at once into a temporary folder, link, and rename: all of it or nothing."""
    to_object = [part for part in command if part != "-shared"] + ["-c"]
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        sources = sorted(recipe.folder.glob("*.cpp"))
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        commands = [
            [*to_object, str(source), "-o", compiled]
            for source, compiled in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            results = list(pool.map(_run, commands))
        output = folder / target.name
        results.append(_run([*command, *objects, "-o", str(output)]))
        for result in results:
            if result.returncode != 0:
                raise BackendUnavailable(
                    f"{command[0]} could not compile {recipe.title}: {_ADVICE}. It said: "
                    f"{result.stderr.strip()[-2000:]}"
                )
        output.replace(target)


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailable(f"{command[0]} could not be run ({error}): {_ADVICE}") from error
