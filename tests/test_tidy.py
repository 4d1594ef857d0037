"""The house rules (docs/STYLE.md), held over the tree, and for each rule a proof that it can fail.

The rules read syntax trees and import nothing of the program: see `tidy_imports.py` and
`tidy_shape.py`.
"""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tidy_imports import (
    FLOORS,
    PURE_SET,
    Source,
    check_dependencies,
    check_floors,
    check_pickle,
    check_pure_set,
    check_sim,
)
from tests.tidy_shape import (
    FILE_LINES_MAX,
    FUNCTION_LINES_MAX,
    OUTERMOST_LOOPS,
    check_broad_except,
    check_docstrings,
    check_file_size,
    check_function_size,
    check_machine_paths,
    check_mirror,
    check_named_paths,
    check_names,
)

ROOT = Path(__file__).parent.parent
FOLDERS = ("penstock", "tests", "bench", "docs", "scripts", ".github")
CODE_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".js", ".css", ".html"}
SOURCE_RULES = [
    check_floors,
    check_sim,
    check_pure_set,
    check_pickle,
    check_docstrings,
    check_function_size,
    check_names,
    check_broad_except,
]


def _files() -> list[Path]:
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    below += [*ROOT.glob("*"), *(ROOT / ".ci").glob("*")]
    return sorted(p for p in below if p.is_file() and p.suffix != ".pyc" and not _is_hidden(p))


def _is_hidden(path: Path) -> bool:
    """True for what tools keep beside the code, such as caches."""
    parts = set(path.relative_to(ROOT).parts) - {".ci", ".gitignore"}
    return any(part.startswith(".") for part in parts)


FILES = {path.relative_to(ROOT).as_posix(): path for path in _files()}
SOURCES = [Source(name, path.read_text()) for name, path in FILES.items() if path.suffix == ".py"]


def _assert_none(violations: Iterator[str] | list[str]) -> None:
    found = list(violations)
    assert not found, "\n" + "\n".join(found)


# The tree keeps the rules.


@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_every_source_keeps(rule: Callable[[Source], Iterator[str]]):
    _assert_none(violation for source in SOURCES for violation in rule(source))


def test_no_file_is_too_long():
    code = {name: path for name, path in FILES.items() if path.suffix in CODE_SUFFIXES}
    _assert_none(v for name, path in code.items() for v in check_file_size(name, path.read_text()))


def test_tests_mirror_the_tree():
    _assert_none(check_mirror([source.path for source in SOURCES]))


@pytest.mark.parametrize(
    "document", ["README.md", "docs/ARCHITECTURE.md", "docs/MEASURED.md", "docs/STYLE.md"]
)
def test_documents_name_what_exists(document: str):
    _assert_none(check_named_paths(document, (ROOT / document).read_text(), ROOT))


def test_no_file_names_a_machine():
    _assert_none(
        v for name, path in FILES.items() for v in check_machine_paths(name, path.read_bytes())
    )


def test_dependencies_are_declared_and_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [s for s in SOURCES if s.package or s.path.startswith("tests/")]
    test = project["optional-dependencies"]["test"]
    _assert_none(check_dependencies(sources, project["dependencies"], test))


def test_the_exceptions_to_rules_are_still_needed():
    sources = {source.path: source for source in SOURCES}
    _assert_none(
        f"{name}: catches nothing broad any more: take it off OUTERMOST_LOOPS"
        for name in OUTERMOST_LOOPS
        if name not in sources or not list(check_broad_except(sources[name], ()))
    )


# Each rule can fail, says where, and lets the good twin pass.


def _found(rule: Callable[[Source], Iterator[str]], path: str, text: str) -> list[str]:
    return list(rule(Source(path, text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("penstock/core/a.py", "import penstock.kv.allocator"),
        ("penstock/core/a.py", "from penstock import kv"),
        ("penstock/core/a.py", "from ..kv import allocator"),
        ("penstock/kv/a.py", "from penstock.transfer.plan import Span"),
        ("penstock/worker/a.py", "from penstock.control import cost"),
        ("penstock/control/a.py", "def f():\n    import penstock.worker"),
        ("penstock/kv/a.py", "if TYPE_CHECKING:\n    from penstock.worker import worker"),
        ("penstock/codec/a.py", "import importlib\nimportlib.import_module('penstock.engine')"),
        ("penstock/server/a.py", "from penstock.control.controller import Controller"),
        ("penstock/server/a.py", "from penstock.runtime import local"),
        ("penstock/cli/a.py", "from penstock import LLM"),
        ("penstock/cli/a.py", "from penstock.llm import LLM"),
        ("penstock/plugins/a.py", ""),
    ],
)
def test_floors_refuse(path: str, text: str):
    (violation,) = _found(check_floors, path, text)
    assert violation.startswith(f"{path}:{max(1, len(text.splitlines()))}: ")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("penstock/core/a.py", "import numpy\nfrom penstock.core import types\nfrom . import b"),
        ("penstock/kv/a.py", "from ..core.types import Tier"),
        ("penstock/server/a.py", "from penstock.core.events import Event"),
        ("penstock/cli/a.py", "from penstock.server import app\nfrom penstock.sim import run"),
        ("penstock/llm.py", "from penstock.runtime import local"),
        ("penstock/__init__.py", "from penstock.llm import LLM"),
        ("tests/kv/test_a.py", "from penstock.worker import worker\nfrom penstock import LLM"),
    ],
)
def test_floors_allow(path: str, text: str):
    assert _found(check_floors, path, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch.nn",
        "from penstock.engine import model",
        "from penstock.codec.int8 import encode",
        "from penstock.server import app",
        "class FastScheduler:\n    pass",
    ],
)
def test_sim_refuses(text: str):
    assert len(_found(check_sim, "penstock/sim/a.py", text)) == 1
    assert _found(check_sim, "penstock/cli/a.py", text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "import os.path",
        "from time import monotonic_ns",
        "from threading import Lock",
        "from concurrent.futures import Future",
        "def f():\n    import random",
        "from datetime import datetime",
        "import importlib",
        "module = __import__(name)",
        "from numpy import random",
        "from numpy.random import default_rng",
        "rng = np.random.default_rng(0)",
        "from typing import Any",
        "def f(x: typing.Any): pass",
        "text = open(path).read()",
    ],
)
@pytest.mark.parametrize("package", sorted(PURE_SET))
def test_the_pure_set_refuses(package: str, text: str):
    (violation,) = _found(check_pure_set, f"penstock/{package}/a.py", text)
    assert violation.startswith(f"penstock/{package}/a.py:{len(text.splitlines())}: ")


def test_the_pure_set_is_whole_floors_and_the_rest_is_free():
    text = "import torch, time\nfrom typing import Any\nx = np.random.rand()"
    for package in FLOORS.keys() - PURE_SET:
        assert _found(check_pure_set, f"penstock/{package}/a.py", text) == []
    allowed = "import numpy as np\nimport msgspec\nfrom typing import NewType\nx = np.zeros(3)"
    assert _found(check_pure_set, "penstock/kv/a.py", allowed) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "socket.send_pyobj(x)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_pickle_is_refused(text: str):
    assert len(_found(check_pickle, "bench/a.py", text)) == 1
    assert _found(check_pickle, "bench/a.py", "np.load(path, allow_pickle=False)") == []


def test_undeclared_and_unused_dependencies_are_refused():
    sources = [
        Source("penstock/core/a.py", "import os\nimport zmq.asyncio\nimport uvicorn"),
        Source("penstock/core/b.py", "from penstock.core import a\nimport pandas"),
        Source("tests/core/test_a.py", "import pytest, zmq\nfrom tests import leaks"),
    ]
    declared = ["pyzmq>=26", "uvicorn", "uvloop>=0.21; sys_platform != 'win32'", "rich", "jinja2"]
    assert [v.split(":", 2)[2] for v in check_dependencies(sources, declared, ["pytest>=9"])] == [
        " declare pandas in pyproject.toml, or do without it",
        " nothing in penstock/ imports jinja2: delete the dependency",
        " nothing in penstock/ imports rich: delete the dependency",
    ]
    assert len(list(check_dependencies(sources, declared, []))) == 4


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "x = 1"),
        (2, '"""Doc."""\ndef f(): pass'),
        (2, '"""Doc."""\nasync def f(): pass'),
        (2, '"""Doc."""\nclass C: pass'),
        (4, '"""Doc."""\nclass C:\n    """Doc."""\n    def f(self): pass'),
        (3, '"""Doc."""\nif x:\n    def f(): pass'),
    ],
)
def test_docstrings_are_asked_for(line: int, text: str):
    (violation,) = _found(check_docstrings, "penstock/core/a.py", text)
    assert violation.startswith(f"penstock/core/a.py:{line}: ")
    assert _found(check_docstrings, "tests/core/test_a.py", text) == []


def test_private_and_overloaded_definitions_need_no_docstring():
    text = (
        '"""Doc."""\ndef _f(): pass\nclass _C:\n    def g(self): pass\n'
        "@overload\ndef h(): ...\ndef outer():\n    '''Doc.'''\n    def inner(): pass\n"
        "class D:\n    '''Doc.'''\n    def __eq__(self, other): pass\n"
    )
    assert _found(check_docstrings, "penstock/core/a.py", text) == []


def test_a_long_file_is_refused():
    assert len(list(check_file_size("a.py", "\n" * (FILE_LINES_MAX + 1)))) == 1
    assert list(check_file_size("a.py", "\n" * FILE_LINES_MAX)) == []


def test_a_long_function_is_refused():
    body = "    x = 1\n" * (FUNCTION_LINES_MAX - 1)
    assert _found(check_function_size, "a.py", f"def f():\n{body}") == []
    (violation,) = _found(check_function_size, "a.py", f"\nasync def f():\n{body}    y = 1\n")
    assert violation.startswith(f"a.py:2: f has {FUNCTION_LINES_MAX + 1} lines")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("penstock/core/utils.py", ""),
        ("tests/common/test_a.py", ""),
        ("a.py", "class BlockManager: pass"),
        ("a.py", "def f():\n    class LoggingMixin: pass"),
    ],
)
def test_vague_names_are_refused(path: str, text: str):
    assert len(_found(check_names, path, text)) == 1
    assert _found(check_names, "penstock/core/block.py", "class Database(Protocol): pass") == []


@pytest.mark.parametrize(
    "text",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, BaseException) as error: raise",
        "with suppress(Exception): f()",
        "with contextlib.suppress(OSError, Exception): f()",
    ],
)
def test_broad_excepts_are_refused(text: str):
    assert len(_found(check_broad_except, "a.py", text)) == 1
    assert list(check_broad_except(Source("a.py", text), outermost_loops=["a.py"])) == []
    assert _found(check_broad_except, "a.py", "try: f()\nexcept (OSError, KeyError): pass") == []


def test_a_test_of_nothing_is_refused():
    modules = ["penstock/kv/allocator.py", "penstock/engine/attention/cpu.py", "penstock/llm.py"]
    good = [
        "tests/kv/test_allocator.py",
        "tests/engine/test_attention.py",
        "tests/engine/attention/test_cpu.py",
        "tests/test_llm.py",
        "tests/cluster/test_drain.py",
        "tests/test_tidy.py",
        "tests/kv/oracle.py",
    ]
    assert list(check_mirror(modules + good)) == []
    bad = ["tests/kv/test_alocator.py", "tests/worker/test_allocator.py", "tests/test_run.py"]
    violations = list(check_mirror(modules + bad))
    assert [violation.split(":")[0] for violation in violations] == sorted(bad)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path):
    (tmp_path / "penstock" / "core").mkdir(parents=True)
    (tmp_path / "penstock" / "core" / "types.py").touch()
    text = (
        "`core/` and `penstock/core/types.py`, `core/types.py`\n"
        "`core/gone.py` `kv/`\n"
        "`--flag` `python a.py` `/v1/models/` `<name>/`\n"
        "```\n`gone.py`\n```\n"
    )
    violations = list(check_named_paths("README.md", text, tmp_path))
    assert [violation.split("`")[1] for violation in violations] == ["core/gone.py", "kv/"]
    assert all(violation.startswith("README.md:2: ") for violation in violations)


@pytest.mark.parametrize("folder", ["/" + "work/", "/" + "root/", "cd ../" + "shared"])
def test_a_path_of_a_machine_is_refused(folder: str):
    (violation,) = check_machine_paths("a.py", f"x = 1\npath = '{folder}x'\n".encode())
    assert violation.startswith("a.py:2: ")
    assert list(check_machine_paths("a.py", b"docs/work/a.md network/root.py")) == []
