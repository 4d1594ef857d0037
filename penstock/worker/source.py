"""`SourceDesk`: the prefill worker's half of every hand-off, pulled (`OfferDesk`) or pushed
(`PushDesk`). Which of the two a request takes is settled when it is assigned.
"""

from collections.abc import Mapping

from penstock.core.config import Handoff, WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Command, MoveDone
from penstock.core.messages import Grant, Release, Renew
from penstock.core.types import RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.worker.numbers import Numbers
from penstock.worker.prefill import Crossing, OfferDesk
from penstock.worker.push import Push, PushDesk
from penstock.worker.sequence import Sequence

Ended = list[Sequence]
"""Sequences whose blocks no peer reads, and nothing of ours writes to a peer, any more."""


class SourceDesk:
    """Sends every message and sequence to the desk that it concerns."""

    def __init__(self, config: WorkerConfig, kv: KVCache, move_ids: Numbers) -> None:
        self._config = config
        self._like_us: set[WorkerId] = set()
        self._others: set[WorkerId] = set()
        self._pulled = OfferDesk(config, kv)
        self._pushed = PushDesk(config, kv, move_ids)

    @property
    def crossings(self) -> Mapping[RequestId, Crossing | Push]:
        """What is under way, by request."""
        return {**self._pulled.crossings, **self._pushed.pushes}

    @property
    def num_expired(self) -> int:
        """How many nobody claimed in time."""
        return self._pulled.num_expired + self._pushed.num_expired

    def meet(self, info: WorkerInfo) -> None:
        """Know a peer: what is on our host and has our shape can be written, others pull."""
        is_alike, is_near = info.layout == self._config.layout, info.host == self._config.host
        for known, is_in in ((self._like_us, is_alike and is_near), (self._others, not is_alike)):
            if is_in:
                known.add(info.worker_id)
            else:
                known.discard(info.worker_id)

    def is_alike(self, peer: WorkerId) -> bool:
        """Tell whether a peer's blocks have our shape, as far as known."""
        return peer not in self._others

    def announce(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Say that a sequence will be handed off, if its peer has to know before. What is kept of a
        sequence is known too late for that.
        """
        is_push = self._config.handoff is Handoff.PUSH and sequence.decode_worker in self._like_us
        is_push &= not sequence.is_to_select
        return self._pushed.announce(sequence, now_ns) if is_push else []

    def offer(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Hand off what is new of a sequence; one that is complete is HANDING_OFF from then on."""
        is_pushed = sequence.request_id in self._pushed.pushes
        return (self._pushed if is_pushed else self._pulled).offer(sequence, now_ns)

    def withdraw(self, sequence: Sequence) -> tuple[Ended, list[Command]]:
        """Call a hand-off off."""
        if sequence.request_id in self._pushed.pushes:
            ended, commands = self._pushed.withdraw(sequence)
            return _listed(ended), commands
        return [], self._pulled.withdraw(sequence)

    def grant(self, event: Grant, now_ns: int) -> tuple[Ended, list[Command]]:
        """Take in where to write, or that nothing may be written any more."""
        ended, commands = self._pushed.grant(event, now_ns)
        return _listed(ended), commands

    def land(self, done: MoveDone) -> tuple[Ended, list[Command]] | None:
        """Take in the end of a move; None when it is none of ours."""
        landed = self._pushed.land(done)
        return None if landed is None else (_listed(landed[0]), landed[1])

    def release(self, event: Release) -> Ended:
        """Take in that a peer has it, or wants it not."""
        request_id = event.request_id
        released = self._pulled.release(request_id, is_spoiled=event.is_spoiled)
        released = released or self._pushed.release(request_id)
        return _listed(released)

    def release_all_of(self, worker_id: WorkerId) -> Ended:
        """Take back everything that was meant for a worker that is gone."""
        pushed = self._pushed.release_all_of(worker_id)
        return self._pulled.release_all_of(worker_id) + pushed

    def renew(self, event: Renew, now_ns: int) -> list[Command]:
        """Renew leases, and say again what the peer has missed."""
        pushes = self._pushed.pushes
        rows = list(zip(event.request_ids, event.num_ready, strict=True))
        self._pushed.renew([i for i, _ in rows if i in pushes], now_ns)
        pulled = [(i, known) for i, known in rows if i not in pushes]
        return self._pulled.renew(pulled, event.worker_id, now_ns)

    def expire(self, now_ns: int) -> tuple[Ended, list[Command]]:
        """Take back what nobody has claimed in time, and say so."""
        pulled, commands = self._pulled.expire(now_ns)
        pushed, more = self._pushed.expire(now_ns)
        return pulled + pushed, commands + more


def _listed(sequence: Sequence | None) -> Ended:
    return [] if sequence is None else [sequence]
