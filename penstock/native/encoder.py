"""`NativeEncoder`: the words in which one native library calls another's encoder.

The codecs (`penstock/codec/`) have one, the transport's server threads call it; neither imports the
other.
"""

from typing import NamedTuple


class NativeEncoder(NamedTuple):
    """A function like `penstock_encode` of `penstock/codec/native/api.h`, and what to give it."""

    function: int
    """Its address."""
    method: int
    shape: bytes
