"""What the links between workers are worth, as a worker finds out when it is asked: `TryLinks` and
its answer, `LinksTried`; and how two workers compare their clocks.

Part of the messages of `core/messages.py`. Nothing here is decided upon: it is for people.
"""

from typing import Final

from msgspec import Struct

from penstock.core.types import MIB, WorkerId

MOVED_BYTES: Final = 64 * MIB
"""What one reading moves when nobody says otherwise."""
MOVED_BYTES_MAX: Final = 256 * MIB


class TryLinks(Struct, frozen=True, tag=True, kw_only=True):
    """Try every transport to each of your peers and measure it with so many bytes."""

    number: int
    moved_bytes: int = MOVED_BYTES


class WayTried(Struct, frozen=True, kw_only=True):
    """One transport from one worker to another: `refusal` says why it does not lead there, "" where
    it does.

    `name` is what moves the bytes there, `is_used` marks the way that requests take. Opening it
    took `opening_ns`, handshake included. `limit` is what the rate is compared with, "" where
    nothing is known of the link.
    """

    kind: str
    name: str = ""
    refusal: str = ""
    is_used: bool = False
    opening_ns: int = 0
    num_bytes: int = 0
    bytes_per_s: float = 0.0
    limit: str = ""
    limit_bytes_per_s: float = 0.0


class Link(Struct, frozen=True, kw_only=True):
    """What the reader found of one owner.

    `fingerprint` is the owner's KV layout; `incompatibility` says why its KV is of no use to the
    reader, "" when it is. `skew_ns` is the owner's time less the reader's, both as their stamps in
    the ledger have it, known to `skew_within_ns`; None when the owner did not answer.
    """

    owner: WorkerId
    ways: tuple[WayTried, ...]
    fingerprint: str
    incompatibility: str = ""
    skew_ns: int | None = None
    skew_within_ns: int = 0


class LinksTried(Struct, frozen=True, tag=True, kw_only=True):
    """Answer to the `TryLinks` of that number, with a link for each peer."""

    number: int
    worker_id: WorkerId
    fingerprint: str
    links: tuple[Link, ...]


class AskTime(Struct, frozen=True, tag=True, kw_only=True):
    """Say what time it is; `asked_ns` is to come back as it is."""

    worker_id: WorkerId
    asked_ns: int


class TellTime(Struct, frozen=True, tag=True, kw_only=True):
    """Answer to `AskTime`."""

    worker_id: WorkerId
    asked_ns: int
    answered_ns: int
