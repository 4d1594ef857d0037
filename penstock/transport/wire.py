"""The words that both ends of TCP use after the handshake; `native/wire.h` says the same in C++.

    read    request(READ, count = runs), count runs      reply, then their bytes
    notify  request(NOTIFY, count = bytes), the bytes    reply

After a reply that refuses, the owner ends the connection. Little-endian, of fixed size, with a
limit on every count: no length that a peer says is believed before it was compared.
"""

from enum import IntEnum
from struct import Struct
from typing import Final

MAGIC: Final = 0x32534E50
RUNS_MAX: Final = 1 << 16
TEXT_MAX: Final = 1 << 16
HEARD_MAX: Final = 4096
"""Notifications that wait to be taken; more are refused."""
READ_BYTES_MAX: Final = 1 << 36

REQUEST: Final = Struct("<IHHQIIQ")
"""Magic, operation, zero, epoch, region, count, id."""
RUN: Final = Struct("<QQ")
"""First byte in the region, number of bytes: several streams can share even a single block."""
REPLY: Final = Struct("<IIQQ40x")
"""Magic, status, id, number of bytes that follow; zeros up to a cache line."""

READ: Final = 1
NOTIFY: Final = 2


class Status(IntEnum):
    """The owner's word on a request."""

    OK = 0
    WRONG_EPOCH = 1
    NO_REGION = 2
    OUT_OF_BOUNDS = 3
    MALFORMED = 4
    BUSY = 5


REFUSALS: Final = {
    Status.WRONG_EPOCH: "it is in another epoch: what was known of it is out of date",
    Status.NO_REGION: "it has no such region",
    Status.OUT_OF_BOUNDS: "what was asked for is not inside its region",
    Status.MALFORMED: "it does not understand the request",
    Status.BUSY: "too many notifications wait there to be taken",
}

# What a native call returns instead of a number of bytes.
LOST: Final = -1
LATE: Final = -2
NONSENSE: Final = -3
REFUSED: Final = -100
"""Minus the status."""
