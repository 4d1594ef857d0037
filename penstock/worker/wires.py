"""`Wires`: which pulls cross encoded, by what pulls from each peer have taken.

Blocks as they are take the link for all their bytes; rows of a codec take it for fewer, and time to
encode there and to decode here. Both are measured as they are used, and the quicker one is asked
for, of requests that accept a loss, where the link is a connection between hosts. The first pull
crosses as it is. What a row would take is then predicted, and corrected by each that comes, so that
one slow pull decides nothing; and what was slower is tried again now and then, since links change.
A last block that is not full always crosses as it is (`codec/codec.py` says why). Called by
`worker/decode.py`; what a codec costs the model was decided where it was loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from penstock.core.config import WorkerConfig
from penstock.core.events import MoveDone
from penstock.core.types import KIB, BlockId, WorkerId
from penstock.kv.group import Pull
from penstock.kv.tiers import RAW
from penstock.worker.arrival import Arrival

WEIGHT: Final = 0.3
"""Weight of the latest pull in a mean."""
MEASURED_BYTES_MIN: Final = 256 * KIB
"""Pulls of fewer bytes, counted as they lie in the pool, say more of latency than of a rate."""
TRIED_EVERY: Final = 16
"""So many pulls in a row go the quicker way before the other one is tried again."""
HOPELESS: Final = 4.0
"""What is so many times slower is not."""
TCP: Final = "tcp"


class Part(NamedTuple):
    """What one move is to bring, and in which codec."""

    pulls: tuple[Pull, ...]
    codec: str


@dataclass(slots=True)
class _Link:
    """What a byte of the pool takes from one peer, in ns, as it is and encoded."""

    plain_ns: float | None = None
    encoded_ns: float | None = None
    num_alike: int = 0
    """Pulls that went the quicker way since the other was tried."""


@dataclass(slots=True)
class Wires:
    """The links of a worker to its peers."""

    config: WorkerConfig
    _links: dict[WorkerId, _Link] = field(default_factory=dict)

    def parts(self, arrival: Arrival, pulls: tuple[Pull, ...]) -> list[Part]:
        """Cut what is to be pulled into moves: whole blocks encoded, the rest as it is."""
        wire, adoption = self.config.wire, arrival.adoption
        if wire is None or not self._is_encoded(arrival, pulls):
            return [Part(pulls, RAW)]
        assert adoption is not None, arrival
        num_full = arrival.offer.num_tokens // self.config.layout.block_size
        partial = {group.destination_of.get(num_full) for group in adoption.groups}
        whole = tuple(_some(p, [i for i in p.destination_ids if i not in partial]) for p in pulls)
        rest = tuple(_some(p, [i for i in p.destination_ids if i in partial]) for p in pulls)
        found = [Part(whole, wire.name), Part(rest, RAW)]
        return [part for part in found if any(p.source_ids for p in part.pulls)]

    def note(self, peer: WorkerId, done: MoveDone) -> None:
        """Learn what a byte takes from a pull that has landed."""
        wire = self.config.wire
        if wire is None or done.error or not done.transport.startswith(TCP):
            return
        num_bytes, is_encoded = float(done.num_bytes), done.codec != RAW
        if is_encoded:
            num_bytes *= self._block_bytes / wire.row_bytes
        if num_bytes < MEASURED_BYTES_MIN:
            return
        link = self._links.setdefault(peer, _Link())
        byte_ns = (done.finished_ns - done.started_ns) / num_bytes
        if is_encoded:
            link.encoded_ns = _mean(link.encoded_ns, byte_ns)
        else:
            link.plain_ns = _mean(link.plain_ns, byte_ns)

    def forget(self, peer: WorkerId) -> None:
        """Know nothing of the way to a peer any more: it is gone."""
        self._links.pop(peer, None)

    def _is_encoded(self, arrival: Arrival, pulls: Iterable[Pull]) -> bool:
        wire, link = self.config.wire, self._links.get(arrival.session.peer)
        if wire is None or link is None or link.plain_ns is None:
            return False
        if arrival.reshaping is not None or arrival.offer.is_push:
            return False
        if not arrival.offer.request.accepts_loss or not all(p.is_verified for p in pulls):
            return False
        if link.encoded_ns is None:
            sent_ns = link.plain_ns * wire.row_bytes
            link.encoded_ns = (sent_ns + wire.encode_ns + wire.decode_ns) / self._block_bytes
        encoded_ns = link.encoded_ns
        is_quicker = encoded_ns < link.plain_ns
        slow_ns, quick_ns = max(encoded_ns, link.plain_ns), min(encoded_ns, link.plain_ns)
        link.num_alike += 1
        if link.num_alike > TRIED_EVERY and slow_ns < HOPELESS * quick_ns:
            link.num_alike = 0
            return not is_quicker
        return is_quicker

    @property
    def _block_bytes(self) -> int:
        (block_bytes,) = self.config.layout.block_bytes
        return block_bytes


def _mean(known: float | None, latest: float) -> float:
    return latest if known is None else known + WEIGHT * (latest - known)


def _some(pull: Pull, wanted: Iterable[BlockId]) -> Pull:
    """Return what a pull has for some of our blocks."""
    ids = set(wanted)
    rows = [i for i, block_id in enumerate(pull.destination_ids) if block_id in ids]
    return Pull(
        tuple(pull.source_ids[i] for i in rows),
        tuple(pull.destination_ids[i] for i in rows),
        tuple(pull.digests[i] for i in rows),
        tuple(pull.generations[i] for i in rows) if pull.generations else (),
    )
