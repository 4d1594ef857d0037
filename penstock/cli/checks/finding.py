"""`Finding`: what a check has to say. Knows no check; every check and `doctor.py` speak in it."""

from collections.abc import Callable, Iterator
from enum import Enum

from msgspec import Struct, field


class State(Enum):
    """OK; WARNING: it works, but slower or not everything; FAILED: serving will not work."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


class Finding(Struct, frozen=True, kw_only=True):
    """One line of the report. `advice` is the next step, for what is not ok.

    `figures` are for scripts; their names end in their units.
    """

    name: str
    state: State
    said: str
    advice: str = ""
    figures: dict[str, float] = field(default_factory=dict)


class Extent(Struct, frozen=True, kw_only=True):
    """How thorough to be. `moved_bytes` is what one transfer measures with.

    `is_quick` imports no torch and compiles nothing.
    """

    is_quick: bool = False
    moved_bytes: int = 64 << 20
    repetitions: int = 7


Check = Callable[[Extent], Iterator[Finding]]


def ok(name: str, said: str, **figures: float) -> Finding:
    """Report that something is as it should be."""
    return Finding(name=name, state=State.OK, said=said, figures=figures)


def warning(name: str, said: str, advice: str, **figures: float) -> Finding:
    """Report what works less well than it could."""
    return Finding(name=name, state=State.WARNING, said=said, advice=advice, figures=figures)


def failed(name: str, said: str, advice: str, **figures: float) -> Finding:
    """Report what will keep Penstock from serving."""
    return Finding(name=name, state=State.FAILED, said=said, advice=advice, figures=figures)
