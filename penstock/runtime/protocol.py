"""What two programs must have in common to take part in one cluster: the same messages.

And what tells two processes that they share a clock. Used by both sides of a join.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.messages import Message

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")


@functools.cache
def protocol_digest() -> str:
    """Return 16 hex digits of what every message looks like in this version."""
    schema = msgspec.json.schema(Message)
    return hashlib.blake2b(
        msgspec.json.encode(schema, order="deterministic"), digest_size=8
    ).hexdigest()


@functools.cache
def machine_id() -> str:
    """Return the same text to all processes that read the same monotonic clock, "" if unknown."""
    try:
        return f"{_BOOT_ID.read_text().strip()}/{os.readlink(_TIME_NAMESPACE)}"
    except OSError:
        return ""
