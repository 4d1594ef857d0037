"""Loads the compiled kernels and declares their functions.

Owns the one handle of the process. A kernel call releases the interpreter lock. Whoever needs the
kernels calls `load_library`; a host calls it before it forks, so that its workers share the result.
"""

from __future__ import annotations

import warnings
from ctypes import CDLL, c_int32, c_int64, c_void_p, sizeof
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from penstock.core.errors import BackendUnavailable
from penstock.engine.native.structs import SIZED
from penstock.native.build import Recipe, build

KERNELS: Final = Recipe("kernels", "the CPU kernels", Path(__file__).parent, is_parallel=True)
_FUNCTIONS: Final = {
    "penstock_packed_words": (c_int64, (c_int64, c_int64, c_int32)),
    "penstock_pack": (None, (c_void_p, c_int64, c_int64, c_int32, c_void_p)),
    "penstock_linear": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "penstock_rows": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "penstock_run": (c_int64, (c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "penstock_attend": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "penstock_store": (
        None,
        (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64),
    ),
    "penstock_sizes": (None, (c_void_p,)),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The compiled kernels, or why there are none and what to do about it."""

    library: CDLL | None
    notice: str | None


@cache
def load_library() -> Loaded:
    """Return the compiled kernels, building them on first use on this machine.

    Where that is impossible it warns, once per process, and says why in `notice`.
    """
    try:
        return Loaded(open_library(build(KERNELS)), None)
    except BackendUnavailable as error:
        notice = f"the model runs on torch operations, several times slower: {error}"
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
        return Loaded(None, notice)


def open_library(path: Path) -> CDLL:
    """Load a compiled library and declare its functions.

    Raises: `BackendUnavailable` when the machine cannot load it.
    """
    try:
        library = CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be loaded ({error}): delete it") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    sizes = (c_int64 * len(SIZED))()
    library.penstock_sizes(sizes)
    assert list(sizes) == [sizeof(struct) for struct in SIZED], list(sizes)
    return library
