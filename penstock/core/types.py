"""The vocabulary every other module speaks: identifiers, roles and units.

Owns names and nothing else. It knows no policy, no tensor library and no process; everything may
import it.
"""

from enum import Enum
from typing import Final, NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockId = NewType("BlockId", int)
"""Index of a block in one group's pool of one worker."""
BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name the contents of a full block: a function of its tokens, its ancestors and the
tenant's salt.
"""

FRONT: Final = WorkerId("front")
"""Destination of what the controller tells the HTTP side or the Python API."""
CONTROLLER: Final = WorkerId("controller")

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
Digest = NewType("Digest", int)
"""64 bits over the bytes of a block (xxh3); 0 where none was taken."""
NO_DIGEST: Final = Digest(0)

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB


class Role(Enum):
    """Which part of a request a worker is meant for. A label, not a capability: every worker can do
    both.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(Enum):
    """Why a request got its last token, in the words of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
