"""Loads the compiled codecs and declares their functions.

Owns the one handle of the process, and the warning when there is none. Every call releases the
interpreter lock.
"""

import logging
from ctypes import CDLL, POINTER, Structure, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

from penstock.core.errors import BackendUnavailable
from penstock.native.build import Recipe, build

CODECS: Final = Recipe("codecs", "the KV codecs", Path(__file__).parent)
DTYPES: Final = ("float32", "bfloat16", "float16")
"""Types of numbers in blocks, as the native side counts them."""
METHODS: Final = ("lossless", "fp8", "int8", "int4", "sparse")
"""Names of the methods, as the native side counts them."""
log = logging.getLogger(__name__)


class Shape(Structure):
    """The shape of blocks: `penstock_shape` of `api.h`."""

    _fields_ = [
        ("num_planes", c_int64),
        ("block_size", c_int64),
        ("width", c_int64),
        ("head_dim", c_int64),
        ("dtype", c_int64),
    ]


_FUNCTIONS: Final = {
    "penstock_encoded_bytes": (c_int64, (c_int64, POINTER(Shape))),
    "penstock_encode": (
        None,
        (c_int64, POINTER(Shape), c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
    ),
    "penstock_decode": (
        c_int64,
        (c_int64, POINTER(Shape), c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    ),
}


@cache
def load_library() -> CDLL | None:
    """Return the compiled codecs, building them on first use on this machine.

    Where that is impossible it warns, once per process, and returns None: numpy does it then.
    """
    try:
        library = CDLL(str(build(CODECS)))
    except (BackendUnavailable, OSError) as error:
        log.warning("KV blocks are compressed by numpy, which is slower: %s", error)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
