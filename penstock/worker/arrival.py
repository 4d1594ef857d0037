"""`Arrival`: a request on its way to this worker, and what it was given here.

`worker/decode.py`, its only user, says what becomes of it.
"""

from dataclasses import dataclass

from penstock.core.messages import GrantedBlocks, GroupBlocks, Offer
from penstock.kv.group import Adoption
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
