"""Own the rules about the shape of code: docstrings, sizes, names, excepts, test files, paths.

Each rule is a function over a source or names to messages `path:line: what to do instead`; it
imports nothing of the program. Called by `test_tidy.py`, which shows that each can fail.
"""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from tests.tidy_imports import Source, called_name

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

VAGUE_FILES = {"util", "utils", "common", "helper", "helpers", "misc", "base"}
VAGUE_CLASS_ENDINGS = ("Manager", "Helper", "Helpers", "Util", "Utils", "Base", "Impl", "Mixin")

# The outermost loop of a process logs and exits; nobody else may swallow what it cannot name.
OUTERMOST_LOOPS: frozenset[str] = frozenset()

# Tests of several modules together, in folders that mirror nothing.
FREE_TEST_FOLDERS = {"cluster", "faults", "bench", "builtin"}
# Top-level tests that are not about a module of the same name.
FREE_TEST_FILES = {"tests/test_tidy.py", "tests/test_leaks.py"}

# Written in pieces, so that this file keeps the rule it states.
MACHINE_PATHS = re.compile(rb"(?<![\w.-])/(?:work|root)(?=/)|\.\./" + rb"shared")

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def check_docstrings(source: Source) -> Iterator[str]:
    """Ask for a docstring on every public module, class, function and method of `penstock/`."""
    if source.package is None:
        return
    name = PurePosixPath(source.path).stem
    if (name == "__init__" or not name.startswith("_")) and not ast.get_docstring(source.tree):
        yield f"{source.path}:1: say what the module owns, does not know, and who calls it"
    yield from _undocumented(source, source.tree.body)


def _undocumented(source: Source, body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _undocumented(source, node.body)
        if not isinstance(node, FUNCTION | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _takes_its_docstring_elsewhere(node):
            yield source.at(node, f"say in one sentence what {node.name} does")
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(source, node.body)


def _takes_its_docstring_elsewhere(node: FUNCTION | ast.ClassDef) -> bool:
    """Tell overloads, overrides and property setters, which are documented at their original."""
    for decorator in node.decorator_list:
        match decorator:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                if name in {"overload", "override", "setter", "deleter"}:
                    return True
    return False


def check_file_size(path: str, text: str) -> Iterator[str]:
    """Hold the outer limit of a file; the habit is 150 lines."""
    lines = text.count("\n")
    if lines > FILE_LINES_MAX:
        yield (
            f"{path}:1: {lines} lines, {FILE_LINES_MAX} at most: "
            "find another cut through the problem, do not just move lines"
        )


def check_function_size(source: Source) -> Iterator[str]:
    """Hold the outer limit of a function; the habit is 5 to 20 lines."""
    for node in source.nodes:
        if isinstance(node, FUNCTION):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield source.at(
                    node,
                    f"{node.name} has {lines} lines, {FUNCTION_LINES_MAX} at most: "
                    "keep the decisions, push the loops into functions of their own",
                )


def check_names(source: Source) -> Iterator[str]:
    """Refuse names that say nothing."""
    path = PurePosixPath(source.path)
    for part in (*path.parts[:-1], path.stem):
        if part in VAGUE_FILES:
            yield f"{source.path}:1: nothing is called {part}: name what the code does"
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith(VAGUE_CLASS_ENDINGS):
            yield source.at(
                node, f"{node.name}: name the class for what it is, a noun of the field"
            )


def check_broad_except(
    source: Source, outermost_loops: Collection[str] = OUTERMOST_LOOPS
) -> Iterator[str]:
    """Refuse to catch what one cannot name, except at a process's outermost loop."""
    if source.path in outermost_loops:
        return
    instead = "catch the errors that the caller can do something about (core/errors.py)"
    for node in source.nodes:
        match node:
            case ast.ExceptHandler(type=caught) if caught is None or _is_broad(caught):
                yield source.at(node, f"no broad except: {instead}")
            case ast.Call(args=arguments) if called_name(node) == "suppress":
                if any(_is_broad(argument) for argument in arguments):
                    yield source.at(node, f"no broad suppress: {instead}")


def _is_broad(caught: ast.expr) -> bool:
    match caught:
        case ast.Name(id="Exception" | "BaseException"):
            return True
        case ast.Tuple(elts=elements):
            return any(_is_broad(element) for element in elements)
    return False


def check_mirror(
    paths: Collection[str], free_files: Collection[str] = FREE_TEST_FILES
) -> Iterator[str]:
    """Ask that `tests/<package>/test_x.py` tests `penstock/<package>/x.py` or the folder `x/`."""
    modules = {PurePosixPath(path).with_suffix("") for path in paths}
    modules |= {parent for module in modules for parent in module.parents}
    for path in sorted(paths):
        test = PurePosixPath(path)
        if test.parts[0] != "tests" or not test.name.startswith("test_") or path in free_files:
            continue
        if test.parts[1] in FREE_TEST_FOLDERS:
            continue
        name = test.stem.removeprefix("test_")
        tested = PurePosixPath("penstock", *test.parts[1:-1], name)
        if tested not in modules:
            yield (
                f"{path}:1: tests mirror the tree and {tested}.py is not there: rename the test, "
                "or put a test of several modules into tests/cluster/ or tests/faults/"
            )


def check_named_paths(document: str, text: str, root: Path) -> Iterator[str]:
    """Ask that every path that a document names in backticks exists, below `penstock/` or not.

    A path is an inline code span that ends in `.py` or `/`, without blanks and placeholders.
    """
    is_fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        if is_fenced:
            continue
        for name in re.findall(r"`([\w.-][\w./-]*(?:\.py|/))`", line):
            if not (root / name).exists() and not (root / "penstock" / name).exists():
                yield f"{document}:{number}: `{name}` does not exist: mend the name or the tree"


def check_machine_paths(path: str, content: bytes) -> Iterator[str]:
    """Refuse paths of the machine on which somebody happened to work."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if match := MACHINE_PATHS.search(line):
            name = match[0].decode()
            yield f"{path}:{number}: {name} is on one machine only: use a path in the repository"
