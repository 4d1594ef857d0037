"""What a transport is to the rest: a way to memory of a peer, behind two narrow protocols.

One file for each way (`shm.py`, `tcp.py`). A way knows how to get at a region and what to say when
it cannot; it does not know who wants the bytes, which peers there are, or what was tried before:
`peers.py` does.
"""

from typing import Protocol

from penstock.transfer.plan import SpanArray
from penstock.transfer.region import PeerMemory, Region


class Source(Protocol):
    """One region of one incarnation of a peer, opened for reading."""

    @property
    def name(self) -> str:
        """What moves the bytes, as the ledger and the metrics call it."""

    @property
    def num_blocks(self) -> int:
        """How many blocks the region has."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one of them."""

    def pull(self, destination: Region, spans: SpanArray) -> None:
        """Copy spans that lie inside both regions; blocks, without the interpreter lock.

        Raises: `PeerLost` or `DeadlineExceeded`; then the destination blocks hold nothing of use.
        """


class Way(Protocol):
    """One means to reach memory of peers. Safe to use from several threads."""

    @property
    def kind(self) -> str:
        """The name by which it is forced, and by which descriptors mean it."""

    def open(self, peer: PeerMemory, index: int) -> Source:
        """Open region `index` of a peer.

        Raises: `PeerLost` saying why this way does not lead there.
        """

    def forget(self, name: str, epoch: int) -> None:
        """Give up what is open to this incarnation; a pull under way may fail."""

    def close(self) -> None:
        """Give up everything."""
