"""`Arrival`: a request on its way to this worker, and what it was given here; its moves under way.

`worker/decode.py`, its only user, says what becomes of it.
"""

from dataclasses import dataclass

from penstock.core.events import Move, MoveClass, Reshape
from penstock.core.messages import GrantedBlocks, GroupBlocks, Offer
from penstock.kv.group import Adoption, Pull
from penstock.kv.tiers import RAW
from penstock.transfer.plan import align
from penstock.transfer.session import Session
from penstock.worker.reshaping import Reshaping
from penstock.worker.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Arrival:
    """A request on its way here.

    `unpulled` are offered blocks that no copy has been asked for yet; with them the first
    `num_ready` tokens are covered. `sequence` and `adoption` are there once it has room.
    """

    offer: Offer
    session: Session
    received_ns: int
    num_ready: int
    unpulled: list[tuple[GroupBlocks, ...]]
    reserved_ns: int = 0
    sequence: Sequence | None = None
    adoption: Adoption | None = None
    reshaping: Reshaping | None = None
    num_moves: int = 0
    num_pulled: int = 0
    is_verified: bool = True
    is_spoiled: bool = False
    """A part was wrong each time it was read."""
    is_fenced: bool = False
    """The prefill worker has said that it does not write here (any more)."""
    outcome: SequenceState = SequenceState.RUNNING
    """What becomes of the sequence when the last copy under way is over."""

    @property
    def is_complete(self) -> bool:
        """True when a copy of everything has been asked for."""
        return self.num_ready == self.offer.num_tokens and not self.unpulled

    @property
    def is_written(self) -> bool:
        """True when a peer may write the blocks it has here: they cannot be given away."""
        is_granted = self.offer.is_push and self.sequence is not None
        return is_granted and self.outcome is not SequenceState.RUNNING and not self.is_fenced

    @property
    def granted(self) -> tuple[GrantedBlocks, ...]:
        """The blocks that wait for content, per group, as a peer needs to know them to write it."""
        assert self.adoption is not None
        blocks = (adopted.destination_of for adopted in self.adoption.groups)
        return tuple(GrantedBlocks(tuple(of), tuple(of.values())) for of in blocks)


@dataclass(frozen=True, slots=True)
class PendingMove:
    """A move under way: for whom, what (pulls or reshapes), how, and the how many-th try."""

    arrival: Arrival
    pulls: tuple[Pull, ...]
    codec: str = RAW
    reshapes: tuple[Reshape, ...] = ()
    tries: int = 1

    def move(self, move_id: int) -> Move:
        """Return it as the mover is told."""
        offer = self.arrival.offer
        # What was pushed is here already: there is nothing left but to compare digests.
        kind = MoveClass.VERIFY if offer.is_push else MoveClass.HANDOFF
        spans = (
            align(p.destination_ids if offer.is_push else p.source_ids, p.destination_ids)
            for p in self.pulls
        )
        return Move(
            move_id=move_id,
            kind=kind,
            request_id=self.arrival.session.request_id,
            source=offer.source,
            epoch=offer.epoch,
            spans=tuple(map(tuple, spans)),
            digests=tuple(p.digests for p in self.pulls),
            generations=() if offer.is_push else tuple(p.generations for p in self.pulls),
            reshapes=self.reshapes,
            codec=self.codec,
        )
