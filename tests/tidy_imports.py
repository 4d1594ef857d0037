"""Own the rules about imports: the floors, the pure set, no pickle, the declared dependencies.

Each rule is a function from sources to messages `path:line: what to do instead`. It reads the
syntax trees and imports nothing of the program. Called by `test_tidy.py`, which shows that each can
fail.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

# A module imports its own package and strictly lower floors (docs/ARCHITECTURE.md).
FLOORS = {
    "core": 0,
    "kv": 1,
    "transfer": 1,
    "worker": 2,
    "control": 2,
    "native": 2,
    "transport": 3,
    "codec": 3,
    "engine": 3,
    "runtime": 4,
    "server": 5,
    "sim": 5,
    "cli": 6,
}
# `penstock/__init__.py`, `penstock/llm.py` and the like: they compose, and nobody imports them.
TOP_LEVEL = "the top level"
TOP_FLOOR = 7

PURE_SET = {"core", "kv", "transfer", "worker", "control"}
IMPURE_MODULES = {
    "asyncio", "concurrent", "ctypes", "datetime", "importlib", "mmap", "multiprocessing", "os",
    "pathlib", "random", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "subprocess", "tempfile", "threading", "time", "torch", "uuid", "zmq",
}  # fmt: skip
IMPURE_CALLS = {"__import__", "eval", "exec", "input", "open"}

SIM_FORBIDDEN = {"engine", "codec", "runtime", "server", "torch"}
SIM_FORBIDDEN_CLASSES = ("Scheduler", "Allocator", "Policy", "Router")

# Distributions whose module has another name.
MODULE_OF = {"pyzmq": "zmq", "prometheus-client": "prometheus_client"}
# Dependencies that nobody imports, each used by the one behind it.
USED_THROUGH = {"jinja2": "transformers", "uvloop": "uvicorn", "httptools": "uvicorn"}
# Modules that are used where they are installed: triton comes with torch for CUDA, NIXL with the
# extra of its name.
OPTIONAL_MODULES = {"triton", "nixl"}

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
PICKLING_METHODS = {"send_pyobj", "recv_pyobj"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository root, with `/`, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def package(self) -> str | None:
        """Name the floor's package, TOP_LEVEL, or None for a file outside `penstock/`."""
        parts = PurePosixPath(self.path).parts
        if parts[0] != "penstock":
            return None
        return parts[1] if len(parts) > 2 else TOP_LEVEL

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{node.lineno}: {message}"


def imported_modules(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Yield each imported dotted name, `from a import b` as `a.b`, with the node that does it.

    Covers `importlib.import_module("a.b")` and `__import__("a.b")` where the name is a literal.
    """
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute_origin(source, node)
            yield from ((node, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node, argument.value


def called_name(node: ast.Call) -> str:
    """Return the last name of what is called: `c` for `a.b.c()`, "" where there is none."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _absolute_origin(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = PurePosixPath(source.path).with_suffix("").parts
    origin = ".".join(parts[: len(parts) - node.level])
    return f"{origin}.{node.module}" if node.module else origin


def _imported_package(module: str) -> str | None:
    """Name the floor's package that `module` is in; None if it is not Penstock's."""
    parts = module.split(".")
    if parts[0] != "penstock":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else TOP_LEVEL


def check_floors(source: Source) -> Iterator[str]:
    """Hold who may import whom."""
    package = source.package
    if package is None:
        return
    if package not in FLOORS and package != TOP_LEVEL:
        yield f"{source.path}:1: give package {package} a floor in tests/tidy_imports.py"
        return
    floor = FLOORS.get(package, TOP_FLOOR)
    for node, module in imported_modules(source):
        target = _imported_package(module)
        if target is None or target == package:
            continue
        if FLOORS.get(target, TOP_FLOOR) >= floor:
            yield source.at(
                node,
                f"{package} (floor {floor}) must not import {module}: move what both need to a "
                "lower floor, or pass it in from a composition root",
            )
        elif package == "server" and target != "core":
            yield source.at(node, f"server imports only core: have {module} passed in")


def check_sim(source: Source) -> Iterator[str]:
    """Keep the simulator a composition of the real cores over its own three ports."""
    if source.package != "sim":
        return
    for node, module in imported_modules(source):
        if SIM_FORBIDDEN & set(module.split(".")[:2]):
            yield source.at(node, f"sim must not import {module}: model it behind a port")
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith(SIM_FORBIDDEN_CLASSES):
            yield source.at(node, f"sim must not define {node.name}: use the real one of the core")


def check_pure_set(source: Source) -> Iterator[str]:
    """Keep clocks, randomness, IO, threads, torch and `Any` out of the pure set."""
    if source.package not in PURE_SET:
        return
    instead = "ask for it with a Command, or take it in an Event or as `now_ns`"
    for node, module in imported_modules(source):
        if module.split(".")[0] in IMPURE_MODULES:
            yield source.at(
                node, f"{source.package} is pure and must not import {module}: {instead}"
            )
        if module.startswith("numpy.random"):
            yield source.at(node, "no randomness in the pure set: hash (seed, position) instead")
        if module in {"typing.Any", "typing_extensions.Any"}:
            yield source.at(node, "no Any in the pure set: name the type, or use object")
    for node in source.nodes:
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
                yield source.at(
                    node, f"{source.package} is pure and must not call {name}: {instead}"
                )
            case ast.Attribute(attr="random", value=ast.Name(id="np" | "numpy")):
                yield source.at(
                    node, "no randomness in the pure set: hash (seed, position) instead"
                )
            case ast.Attribute(attr="Any", value=ast.Name(id="typing" | "t")):
                yield source.at(node, "no Any in the pure set: name the type, or use object")


def check_pickle(source: Source) -> Iterator[str]:
    """Keep pickle, which runs code that a peer sends, out of the whole tree."""
    instead = "encode a msgspec struct with msgpack"
    for node, module in imported_modules(source):
        if module.split(".")[0] in PICKLES:
            yield source.at(node, f"no {module}: {instead}")
    for node in source.nodes:
        match node:
            case ast.Attribute(attr=name) if name in PICKLING_METHODS:
                yield source.at(node, f"{name} pickles: {instead}")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield source.at(node.value, "no allow_pickle=True: store plain arrays")


def check_dependencies(
    sources: Iterable[Source], dependencies: Iterable[str], test_dependencies: Iterable[str]
) -> Iterator[str]:
    """Ask that what is imported is declared, and that each dependency is imported by `penstock/`.

    Both lists hold requirements as in `pyproject.toml`: `name>=1; marker`.
    """
    declared = {_distribution(requirement) for requirement in dependencies}
    allowed = {MODULE_OF.get(name, name) for name in declared}
    allowed_in_tests = allowed | {_distribution(requirement) for requirement in test_dependencies}
    used = set()
    for source in sources:
        is_product = source.package is not None
        for node, module in imported_modules(source):
            root = module.split(".")[0]
            used |= {root} if is_product else set()
            if root in sys.stdlib_module_names or root in OPTIONAL_MODULES | {"penstock", "tests"}:
                continue
            if root not in (allowed if is_product else allowed_in_tests):
                yield source.at(node, f"declare {root} in pyproject.toml, or do without it")
    for name in sorted(declared):
        user = USED_THROUGH.get(name, name)
        if MODULE_OF.get(user, user) not in used:
            yield f"pyproject.toml:1: nothing in penstock/ imports {name}: delete the dependency"


def _distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()
