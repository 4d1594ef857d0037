"""`PushDesk`: the prefill worker's half of a hand-off by push, there to be compared with pull
(`worker/prefill.py`).

A sequence is announced when it is assigned, before anything of it is computed; the decode worker
reserves blocks and grants them. What is finished is written there, one move after the other, and
said to be there when it has landed. Who has granted is told when nothing is written any more:
before that it cannot give the blocks to anybody else, which pull does without.

Source: KVDirect (arXiv 2501.14743), push mode.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Move, MoveClass, MoveDone, Send, Span, SubmitMove
from penstock.core.messages import (
    Expired,
    Grant,
    GrantedBlocks,
    GroupBlocks,
    Offer,
    Offered,
    Progress,
    RequestFailed,
    Withdraw,
)
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.transfer.plan import align
from penstock.transfer.session import PUSH_SOURCE, Session, SessionState
from penstock.worker.lease import Leases
from penstock.worker.numbers import Numbers
from penstock.worker.sequence import Sequence, SequenceState

_NOTHING: Final = GroupBlocks(0, ())


@dataclass(slots=True)
class Push:
    """A sequence whose blocks are to be written to a peer.

    Blocks of `num_ready` tokens are finished, those of `num_written` have landed there. `grant`
    says where they go. `end` is set when the session is to end as soon as nothing is being written.
    """

    sequence: Sequence
    session: Session
    num_ready: int = 0
    num_written: int = 0
    grant: Grant | None = None
    is_writing: bool = False
    end: SessionState | None = None


class PushDesk:
    """Announces sequences, writes what is finished, and says when their blocks are free again."""

    def __init__(self, config: WorkerConfig, kv: KVCache, move_ids: Numbers) -> None:
        self.pushes: dict[RequestId, Push] = {}
        self.num_expired = 0
        self._config = config
        self._kv = kv
        self._move_ids = move_ids
        self._moves: dict[int, tuple[Push, int]] = {}
        self._leases = Leases(config.lease_ns)

    def announce(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Ask the decode worker for blocks before the prefill begins."""
        config = self._config
        assert sequence.decode_worker is not None
        session = Session(sequence.request_id, sequence.decode_worker, PUSH_SOURCE)
        self.pushes[sequence.request_id] = Push(sequence, session)
        num_groups = len(config.layout.groups)
        offer = Offer(
            request=sequence.request,
            source=config.worker_id,
            epoch=config.epoch,
            num_tokens=sequence.target_tokens,
            num_ready=0,
            groups=(_NOTHING,) * num_groups,
            runs=((),) * num_groups,
            timeline=copy(sequence.timeline),
            lease_ns=config.lease_ns,
            is_push=True,
        )
        return [Send(sequence.decode_worker, offer), *self._leases.begin(session, now_ns)]

    def offer(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Write what a step has finished, if it is known where to."""
        push = self.pushes[sequence.request_id]
        commands: list[Command] = []
        if push.end is not None:
            return commands
        if sequence.num_computed == sequence.target_tokens:
            push.num_ready = sequence.num_computed
            sequence.move_to(SequenceState.HANDING_OFF)
            sequence.timeline.offered_ns = now_ns
            worker_id = self._config.worker_id
            offered = Offered(request_id=sequence.request_id, worker_id=worker_id)
            commands.append(Send(CONTROLLER, offered))
        elif self._kv.is_reserved(sequence.request_id, sequence.target_tokens):
            block_size = self._config.layout.block_size
            push.num_ready = sequence.num_computed - sequence.num_computed % block_size
        return commands + self._write(push)

    def grant(self, event: Grant, now_ns: int) -> tuple[Sequence | None, list[Command]]:
        """Take in where to write, or that nothing may be written any more; say again what the peer
        has missed. Returns the sequence if it is over.
        """
        push = self.pushes.get(event.request_id)
        if push is None:
            return None, [self._withdraw(event.request_id, event.worker_id)]
        if event.is_revoked:
            return self._end(push, SessionState.RELEASED)
        self._leases.renew(push.session, now_ns)
        if push.end is not None:
            return None, []
        if push.grant is None:
            push.grant = event
            push.session.move_to(SessionState.RESERVED)
        missed = event.num_ready < push.num_written
        again = [self._progress(push, event.num_ready)] if missed else []
        return None, again + self._write(push)

    def renew(self, request_ids: Iterable[RequestId], now_ns: int) -> None:
        """Give what still waits for a grant another lease."""
        for request_id in request_ids:
            if request_id in self.pushes:
                self._leases.renew(self.pushes[request_id].session, now_ns)

    def land(self, done: MoveDone) -> tuple[Sequence | None, list[Command]] | None:
        """Take in the end of a move; None when it is none of ours. Returns the sequence if it is
        over.
        """
        if done.move_id not in self._moves:
            return None
        push, num_ready = self._moves.pop(done.move_id)
        push.is_writing = False
        if push.end is not None:
            return self._end(push, push.end)
        if done.error is not None:
            failed = RequestFailed(
                request_id=push.session.request_id,
                reason=f"push to {push.session.peer} failed: {done.error}",
                is_retryable=True,
                worker_id=self._config.worker_id,
            )
            sequence, commands = self._end(push, SessionState.RELEASED)
            return sequence, [Send(CONTROLLER, failed), *commands]
        push.sequence.timeline.pull_copy_ns += done.finished_ns - done.started_ns
        before, push.num_written = push.num_written, num_ready
        is_last = num_ready == push.sequence.target_tokens
        push.session.move_to(SessionState.LANDED if is_last else SessionState.RESERVED)
        return None, [self._progress(push, before), *self._write(push)]

    def withdraw(self, sequence: Sequence) -> tuple[Sequence | None, list[Command]]:
        """Call a push off; it is over as soon as nothing is being written."""
        push = self.pushes[sequence.request_id]
        return self._end(push, push.end or SessionState.RELEASED)

    def release(self, request_id: RequestId) -> Sequence | None:
        """Return the sequence whose content has arrived. None: that is known already."""
        push = self.pushes.get(request_id)
        return self._end(push, SessionState.RELEASED)[0] if push is not None else None

    def release_all_of(self, worker_id: WorkerId) -> list[Sequence]:
        """Give up what was meant for a worker that is gone; return what is over now."""
        lost = [push for push in self.pushes.values() if push.session.peer == worker_id]
        ended = [self._end(push, SessionState.RELEASED)[0] for push in lost]
        return [sequence for sequence in ended if sequence is not None]

    def expire(self, now_ns: int) -> tuple[list[Sequence], list[Command]]:
        """Give up what nobody has granted or confirmed in time, and say so."""
        over, commands = self._leases.over([p.session for p in self.pushes.values()], now_ns)
        self.num_expired += len(over)
        sequences = []
        for session in over:
            expired = Expired(request_id=session.request_id, worker_id=self._config.worker_id)
            sequence, more = self._end(self.pushes[session.request_id], SessionState.EXPIRED)
            commands += [Send(CONTROLLER, expired), *more]
            sequences += [sequence] if sequence is not None else []
        return sequences, commands

    def _write(self, push: Push) -> list[Command]:
        """Write what is finished and has not been written; one move at a time."""
        is_new = push.num_ready > push.num_written
        if push.grant is None or push.is_writing or not is_new:
            return []
        # From now on none of its blocks may be taken from it.
        push.is_writing = push.sequence.is_pinned = True
        push.session.move_to(SessionState.IN_FLIGHT)
        move_id = self._move_ids.next()
        self._moves[move_id] = (push, push.num_ready)
        parts = self._parts(push, push.num_written, push.num_ready)
        groups = zip(parts, push.grant.groups, strict=True)
        move = Move(
            move_id=move_id,
            kind=MoveClass.HANDOFF,
            request_id=push.session.request_id,
            source=self._config.worker_id,
            epoch=push.grant.epoch,
            spans=tuple(_spans(part, granted) for part, granted in groups),
            destination=push.session.peer,
        )
        return [SubmitMove(move)]

    def _parts(self, push: Push, after: int, num_ready: int) -> tuple[GroupBlocks, ...]:
        is_last = num_ready == push.sequence.target_tokens
        return self._kv.offer(push.session.request_id, num_ready, after=after, is_last=is_last)

    def _progress(self, push: Push, after: int) -> Command:
        """Say what is written beyond `after` tokens."""
        is_last = push.num_written == push.sequence.target_tokens
        message = Progress(
            request_id=push.session.request_id,
            source=self._config.worker_id,
            epoch=self._config.epoch,
            after=after,
            num_ready=push.num_written,
            groups=self._parts(push, after, push.num_written),
            timeline=copy(push.sequence.timeline) if is_last else None,
        )
        return Send(push.session.peer, message)

    def _end(self, push: Push, state: SessionState) -> tuple[Sequence | None, list[Command]]:
        """End a push now, or note that it ends when what is being written has landed."""
        push.end = state
        if push.is_writing:
            return None, []
        request_id = push.session.request_id
        del self.pushes[request_id]
        push.session.move_to(state)
        push.sequence.is_pinned = False
        return push.sequence, [self._withdraw(request_id, push.session.peer)]

    def _withdraw(self, request_id: RequestId, peer: WorkerId) -> Command:
        return Send(peer, Withdraw(request_id=request_id, source=self._config.worker_id))


def _spans(part: GroupBlocks, granted: GrantedBlocks) -> tuple[Span, ...]:
    """Return what to write of a part: the entries that the peer wants."""
    destination_of = dict(zip(granted.entries, granted.block_ids, strict=True))
    rows = [
        (block_id, destination_of[entry])
        for entry, block_id in enumerate(part.block_ids, part.first)
        if entry in destination_of
    ]
    return tuple(align([source for source, _ in rows], [to for _, to in rows]))
