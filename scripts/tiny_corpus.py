"""Reads the interpreter's own standard library and splits it into train and held-out files.

Owns which files count, how they are deduplicated and on which side of the split each one falls.
Knows neither tokens nor chats; `train_tiny.py` calls it once. The text is under the PSF licence.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests and the folders with a life of their own are no library code; `encodings` and the files
# below are tables of characters or of documentation, from which nobody learns Python.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data", "__pycache__", "__phello__", "lib-dynload"}
)
EXCLUDED_NAMES = ("_sysconfigdata", "config-", "entities.py", "mime_tables")
HELD_OUT_PER_MILLE = 50


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The modules to learn from and those never shown."""

    train: tuple[Module, ...]
    held_out: tuple[Module, ...]


def read_corpus(root: Path | None = None) -> Corpus:
    """Read every library module below `root`, the running interpreter's library unless given.

    Files with equal text count once. The side of a file follows from its name alone, so that a
    change of one file moves no other.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    train: list[Module] = []
    held_out: list[Module] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _counts(relative):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").strip() + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen or len(text) < 200:
            continue
        seen.add(digest)
        module = Module(_dotted(relative), text)
        (held_out if _is_held_out(module.name) else train).append(module)
    return Corpus(tuple(train), tuple(held_out))


def _counts(relative: Path) -> bool:
    if EXCLUDED_FOLDERS.intersection(relative.parts[:-1]):
        return False
    return not relative.name.startswith(EXCLUDED_NAMES)


def _dotted(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"penstock-tiny/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE
