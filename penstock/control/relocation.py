"""`Relocation`: which running decodes go on at another worker, because that pays.

A worker that has changed sides computes prompts, and each of its steps may be a long one: what it
still decodes waits for them. Such a sequence is moved to a worker that is meant to decode, if one
has a seat and room for it within the TPOT, and if the time that it saves over what is left of its
answer is more than the copy of its KV takes, behind those that go with it. What cannot go now is
looked at again; nobody is moved to where it has been.

The worker that had it says all its tokens and then that it has offered it (`Offered`), so what its
successor says before that is kept back: tokens reach the client in order whatever the links do.

Decides and books; called by the controller after roles were looked at.
"""

from collections.abc import Iterable

from penstock.control.fleet import CLOSED, Fleet
from penstock.control.record import RequestRecord, WorkerRecord
from penstock.control.router import Router
from penstock.core.events import Command, Send
from penstock.core.messages import Migrate, TokenOutput
from penstock.core.request import RequestState
from penstock.core.types import Role, WorkerId


class Relocation:
    """Moves sequences off workers that prompts are meant for."""

    def __init__(self, fleet: Fleet, router: Router) -> None:
        self.num_moved = 0
        self._fleet = fleet
        self._router = router
        self._looked_ns = 0
        self._work_ns = 0.0
        self._num_booked = 0

    def look(self, records: Iterable[RequestRecord], now_ns: int) -> list[Command]:
        """Book what is to move now; return what to tell those that have it."""
        stall_ns = self._stall_ns(now_ns)
        if not self._fleet.has_pairs or not stall_ns:
            return []
        crowded = [w for w in self._fleet if w.role is Role.PREFILL and w.num_decodes]
        if not crowded:
            return []
        copying_ns = {w.slot: 0.0 for w in crowded}
        commands: list[Command] = []
        for record in records:
            source = record.decode
            if source is None or source.slot not in copying_ns or not _is_movable(record):
                continue
            to = self._successor(record, source, stall_ns, copying_ns, now_ns)
            if to is None:
                continue
            message = Migrate(request_id=record.wire_id, decode_worker=to.info.worker_id)
            commands.append(Send(source.info.worker_id, message))
            self._router.move(record, to, now_ns)
            record.early = []
            record.move_to(RequestState.HANDING_OFF)
            self.num_moved += 1
        return commands

    def _stall_ns(self, now_ns: int) -> float:
        """Return how long prompts keep a step of a prefill worker, on the mean since the last look:
        the time of one of them, for the part of the time in which there was one.
        """
        fleet = self._fleet
        elapsed_ns = max(now_ns - self._looked_ns, 1)
        work_ns, count = fleet.work_ns - self._work_ns, fleet.num_booked - self._num_booked
        self._looked_ns, self._work_ns, self._num_booked = now_ns, fleet.work_ns, fleet.num_booked
        num_prefill = sum(w.role is Role.PREFILL for w in fleet)
        if not count or not num_prefill:
            return 0.0
        return work_ns / count * min(work_ns / (elapsed_ns * num_prefill), 1.0)

    def _successor(
        self,
        record: RequestRecord,
        source: WorkerRecord,
        stall_ns: float,
        copying_ns: dict[int, float],
        now_ns: int,
    ) -> WorkerRecord | None:
        """Return the worker to which it pays to move a sequence, and count its copy; or None."""
        fleet = self._fleet
        ask = self._router.ask_to_go_on(record, now_ns)
        steps = self._router.steps_of_seats(ask)
        for worker in (*record.been, *record.holders):
            if worker is fleet.workers.get(worker.info.worker_id):
                steps[worker.slot] = CLOSED
        slot = int(steps.argmin())
        if steps[slot] >= CLOSED:
            return None
        to = fleet.at(slot)
        here_ns = source.step_with_ns(ask.num_tokens)
        num_bytes = ask.num_tokens * fleet.token_bytes
        names = source.info.worker_id, to.info.worker_id
        copy_ns = copying_ns[source.slot] + fleet.transfers.predict_ns(*names, num_bytes, 1)
        gain_ns = float(here_ns + stall_ns - steps[slot]) * ask.expected_output_tokens
        if gain_ns <= copy_ns:
            return None
        copying_ns[source.slot] = copy_ns
        return to


def _is_movable(record: RequestRecord) -> bool:
    """True for what decodes, and is not on its way."""
    is_decoding = record.state is RequestState.DECODING and record.is_decoding
    return is_decoding and record.early is None


def is_due(record: RequestRecord, speaker: WorkerId, output: TokenOutput) -> bool:
    """Tell whether tokens of a request that moves may be passed on; what comes early is kept."""
    if record.decode is None or speaker != record.decode.info.worker_id or record.early is None:
        return True
    record.early.append(output)
    return False
