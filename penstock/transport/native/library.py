"""Loads the compiled part of the transport and declares its functions.

Owns the one handle of the process, and the warning when there is none. Every call releases the
interpreter lock.
"""

import logging
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    addressof,
    byref,
    c_char,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.core.errors import BackendUnavailable
from penstock.native.build import Recipe, build

TRANSPORT: Final = Recipe("transport", "the native transport", Path(__file__).parent)
log = logging.getLogger(__name__)


class Reading(Structure):
    """One read of a peer's region: `penstock_reading` of `api.h`."""

    Streams = c_int32
    _fields_ = [
        ("streams", POINTER(c_int32)),
        ("num_streams", c_int64),
        ("epoch", c_uint64),
        ("region", c_int64),
        ("destination", c_void_p),
        ("block_bytes", c_int64),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("patience_ms", c_int64),
        ("bytes_per_ms_min", c_int64),
    ]


DTYPES: Final = ("float32", "bfloat16", "float16")
"""Types of numbers in blocks, as the native side counts them."""


class Side(Structure):
    """Blocks of one side of a cutting: `penstock_side` of `api.h`."""

    _fields_ = [
        ("blocks", c_void_p),
        ("block_size", c_int64),
        ("num_heads", c_int64),
        ("first_head", c_int64),
        ("dtype", c_int64),
    ]


class Cutting(Structure):
    """How staged blocks become ours: `penstock_cutting` of `api.h`."""

    _fields_ = [
        ("theirs", Side),
        ("ours", Side),
        ("num_planes", c_int64),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
    ]


_FUNCTIONS: Final = {
    "penstock_copy": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p, c_int64)),
    "penstock_cut": (None, (POINTER(Cutting), c_void_p, c_int64)),
    "penstock_read": (c_int64, (POINTER(Reading),)),
    "penstock_notify": (c_int64, (c_int32, c_uint64, c_void_p, c_int64, c_int64)),
    "penstock_server_new": (c_void_p, (c_uint64, c_int64, c_int64)),
    "penstock_server_add": (c_int64, (c_void_p, c_void_p, c_int64, c_int64)),
    "penstock_server_add_encoded": (
        c_int64,
        (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
    ),
    "penstock_server_serve": (c_int64, (c_void_p, c_int32)),
    "penstock_server_heard": (c_int64, (c_void_p, c_void_p)),
    "penstock_server_counts": (None, (c_void_p, c_void_p)),
    "penstock_server_delete": (None, (c_void_p,)),
}


@cache
def load_library() -> CDLL | None:
    """Return the compiled transport, building it on first use on this machine.

    Where that is impossible it warns, once per process, and returns None: the callers then use
    Python, and say so in the names of their transports.
    """
    try:
        library = CDLL(str(build(TRANSPORT)))
    except (BackendUnavailable, OSError) as error:
        log.warning("KV blocks are moved by Python, which is slower: %s", error)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def address_of_own(array: npt.NDArray[np.int64]) -> int:
    """Return where an array that we have made lies, one that may be written and is not empty: in a
    third of the time that `array.ctypes.data` takes, which counts where one block is moved.
    """
    return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]


def read(library: CDLL, reading: Reading) -> int:
    """Return the bytes that landed, or the negative outcome."""
    return int(library.penstock_read(byref(reading)))
