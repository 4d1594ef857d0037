"""`Controller`: the core that decides for the cluster.

Owns the table of live requests. It admits (`admission.py`), routes (`router.py`), cancels, retries
on another worker what a lost one had (with the tokens that the client already got, so the stream
goes on), and tells the front end how it ended. Sampling depends on seed and position alone, so a
continued request gets the very tokens it would have got. Workers are the fleet's (`fleet.py`); who
comes and goes is decided in `membership.py`.
"""

from penstock.control import membership
from penstock.control.admission import Admission
from penstock.control.audit import audit
from penstock.control.fleet import Fleet
from penstock.control.policies import HOLDS_BACK
from penstock.control.record import RequestRecord, WorkerRecord
from penstock.control.relocation import Relocation, is_due
from penstock.control.roles import Roles
from penstock.control.router import Router
from penstock.control.sizing import Sizing
from penstock.control.status import status_of
from penstock.core.config import ControllerConfig
from penstock.core.errors import PenstockError
from penstock.core.events import (
    Command,
    Configured,
    Drain,
    Event,
    Retire,
    Send,
    SetRole,
    WakeAt,
    Woken,
    WorkerLost,
    WorkerSuspected,
)
from penstock.core.explain import Accuracy, Explanation
from penstock.core.messages import (
    BlocksChanged,
    Cancel,
    Expired,
    Hello,
    Load,
    Offered,
    RequestFailed,
    Submit,
    TokenOutput,
    Tokens,
)
from penstock.core.request import Request, RequestState
from penstock.core.service import ClusterStatus
from penstock.core.types import FRONT, NS_PER_MS, RequestId, WorkerId

_QUEUE_KEY = "queue"
_ROLES_KEY = "roles"


class Controller:
    """The core of the cluster. `handle` is the only way in; all else only looks."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.fleet = Fleet(config, is_holding=config.policy in HOLDS_BACK)
        self.router = Router(config, self.fleet)
        self.admission = Admission(config, self.fleet, self.router)
        self.roles = Roles(config, self.fleet, self.admission.queue)
        self.relocation = Relocation(self.fleet, self.router)
        self.sizing = Sizing(config, self.fleet, self.roles)
        self.requests: dict[RequestId, RequestRecord] = {}
        self._by_wire_id: dict[RequestId, RequestRecord] = {}
        self._totals = dict.fromkeys(("arrived", "finished", "aborted", "failed", "retried"), 0)
        self._now_ns = 0
        self._wakes_ns: int | None = None
        self._has_room = False
        self._is_looking = False

    # -------------------------------------------------------------------------------------- queries

    @property
    def workers(self) -> dict[WorkerId, WorkerRecord]:
        """The workers that are up, in order of joining."""
        return self.fleet.workers

    def refusal(self, request: Request) -> PenstockError | None:
        """Say why `request` would not be taken now, or None. Changes nothing."""
        expected_ns = self.admission.expected_ns(request, self._now_ns)
        return self.admission.refusal(request, len(self.requests), self._now_ns, expected_ns)

    def explain(self, request_id: RequestId) -> Explanation | None:
        """Say why a request went where it went, and what came of it; None when nobody knows."""
        return self.router.explanations.explain(request_id)

    def accuracy(self) -> Accuracy:
        """Return how good predictions were, as totals since the start."""
        return self.router.explanations.accuracy(*self.fleet.fit_errors())

    def status(self) -> ClusterStatus:
        """Return the cluster as of now."""
        return status_of(
            self.fleet,
            self.requests,
            self.roles,
            self.sizing,
            is_draining=self.admission.is_draining,
            totals=self._totals,
        )

    # --------------------------------------------------------------------------------------- events

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in; return what to tell workers and the front end."""
        self._now_ns = now_ns
        commands = self._react(event, now_ns)
        if self._has_room:
            self._has_room = False
            commands += self._place_queued(now_ns)
        if self.fleet.leaving:
            commands += membership.dismiss(self.fleet, self.requests.values())
        return commands

    def _react(self, event: Event, now_ns: int) -> list[Command]:
        match event:
            case Tokens():
                return self._take_tokens(event, now_ns)
            case Submit(request=request):
                return self._submit(request, now_ns)
            case Cancel(request_id=request_id):
                return self._cancel(request_id)
            case Offered(request_id=wire_id):
                return self._note_offered(wire_id, now_ns)
            case RequestFailed():
                return self._take_failure(event, now_ns)
            case Expired():
                return self._take_expired(event, now_ns)
            case Woken(key=key):
                return self._look(now_ns) if key == _ROLES_KEY else self._expire(now_ns)
            case Drain():
                self.admission.is_draining = True
                return []
            case Configured(config=config):
                assert config == self.config, (config, self.config)
                return []
            case _:
                return self._change_fleet(event, now_ns)

    def _change_fleet(self, event: Event, now_ns: int) -> list[Command]:
        """Take in what is about a worker, not a request; there may be room now."""
        commands: list[Command] = []
        self._has_room = bool(self.admission.queue)
        match event:
            case Load():
                self.fleet.note_load(event)
            case BlocksChanged():
                self.fleet.note_blocks(event)
            case Hello():
                commands = membership.welcome(self.fleet, event)
            case WorkerLost():
                commands = self._lose(event, now_ns)
            case WorkerSuspected():
                membership.suspect(self.fleet, event)
            case Retire():
                membership.retire(self.fleet, event)
            case SetRole():
                membership.set_role(self.fleet, event)
            case _:
                raise AssertionError(f"a {type(event).__name__} is not for the controller")
        return commands

    # ------------------------------------------------------------------------- a request comes in

    def _submit(self, request: Request, now_ns: int) -> list[Command]:
        self._totals["arrived"] += 1
        expected_ns = self.admission.expected_ns(request, now_ns)
        refusal = self.admission.refusal(request, len(self.requests), now_ns, expected_ns)
        if refusal is not None:
            self._totals["failed"] += 1
            failed = RequestFailed(
                request_id=request.request_id,
                reason=str(refusal),
                retry_after_s=getattr(refusal, "retry_after_s", None),
            )
            return [Send(FRONT, failed)]
        assert request.request_id not in self.requests, request.request_id
        commands: list[Command] = []
        victim = self.admission.victim(request, len(self.requests))
        if victim is not None:
            reason = "given up for a more urgent request"
            commands += self._fail(victim, reason, retry_after_s=1.0)
        record = RequestRecord(request, now_ns)
        record.expected_ns = expected_ns
        self.requests[request.request_id] = record
        return commands + self._queue(record, now_ns) + self._look_again(now_ns)

    def _queue(self, record: RequestRecord, now_ns: int) -> list[Command]:
        """Assign a request to workers, or let it wait its turn."""
        if not self.admission.queue:
            commands = self._place(record, now_ns)
            if commands:
                return commands
        record.queued_ns = now_ns
        self.admission.queue.add(record)
        self._has_room = True
        return self._wake(now_ns)

    def _place_queued(self, now_ns: int) -> list[Command]:
        """Assign those that wait, in their turn, until there is no room for the next."""
        commands: list[Command] = []
        queue = self.admission.queue
        while (record := queue.first()) is not None:
            placed = self._place(record, now_ns)
            if not placed:
                break
            queue.take(record)
            commands += placed
        return commands

    def _place(self, record: RequestRecord, now_ns: int) -> list[Command]:
        """Assign a request to workers; nothing when nobody is open."""
        chosen = self.router.choose(record, now_ns)
        if chosen is None:
            return []
        request = self.router.assign(record, *chosen)
        self._by_wire_id[record.wire_id] = record
        is_alone = record.prefill is record.decode
        record.move_to(RequestState.DECODING if is_alone else RequestState.PREFILLING)
        return [record.assignment(request)]

    # --------------------------------------------------------------------------- a request goes on

    def _note_offered(self, wire_id: RequestId, now_ns: int) -> list[Command]:
        record = self._by_wire_id.get(wire_id)
        if record is None:
            return []
        if record.state is RequestState.PREFILLING:
            self.router.note_prefilled(record, now_ns)
            record.move_to(RequestState.HANDING_OFF)
            self._has_room = bool(self.admission.queue)
        elif record.early is not None and record.decode is not None:
            early, record.early = tuple(record.early), None
            worker_id = record.decode.info.worker_id
            return self._take_tokens(Tokens(worker_id=worker_id, outputs=early), now_ns)
        return []

    def _take_tokens(self, event: Tokens, now_ns: int) -> list[Command]:
        """Pass new tokens on to the front end, under the id that it knows."""
        outputs: list[TokenOutput] = []
        commands: list[Command] = []
        for output in event.outputs:
            record = self._by_wire_id.get(output.request_id)
            if record is None:
                if output.finish_reason is None:  # the cancel crossed these tokens, or was lost
                    commands.append(Send(event.worker_id, Cancel(request_id=output.request_id)))
                continue
            if record.been and not is_due(record, event.worker_id, output):
                continue
            record.output_token_ids += output.token_ids
            self.router.note_tokens(record, len(output.token_ids))
            if not record.is_decoding:
                self._start_decoding(record, output, now_ns)
            elif record.been:
                self.router.note_moved(record, event.worker_id)
            outputs.append(record.under_own_id(output))
            if output.finish_reason is not None:
                self.router.lengths.note_end()
                self._end(record, RequestState.FINISHED)
        if outputs:
            tokens = Tokens(worker_id=event.worker_id, outputs=tuple(outputs))
            commands.append(Send(FRONT, tokens))
        return commands

    def _start_decoding(self, record: RequestRecord, output: TokenOutput, now_ns: int) -> None:
        """Note the first token of an attempt; it may overtake the word that it was offered."""
        record.is_decoding = True
        self.router.note_prefilled(record, now_ns)
        self.router.note_landed(record)
        self._has_room = bool(self.admission.queue)
        if record.state is RequestState.PREFILLING:
            record.move_to(RequestState.HANDING_OFF)
        if record.state is RequestState.HANDING_OFF:
            record.move_to(RequestState.DECODING)
        explanations = self.router.explanations
        explanations.note_first_token(record.request_id, output.timeline, now_ns)

    # ------------------------------------------------------------------------------ a request ends

    def _cancel(self, request_id: RequestId) -> list[Command]:
        record = self.requests.get(request_id)
        if record is None:
            return []
        commands = self._call_off(record)
        self._end(record, RequestState.ABORTED)
        return commands

    def _call_off(self, record: RequestRecord) -> list[Command]:
        """Tell every worker that is up and holds something of this attempt to drop it."""
        cancel = Cancel(request_id=record.wire_id)
        return [Send(worker, cancel) for worker in record.workers if worker in self.workers]

    def _end(self, record: RequestRecord, state: RequestState) -> None:
        self.router.release(record, self._now_ns)
        record.move_to(state)
        self._totals[state.value] += 1
        del self.requests[record.request_id]
        self._by_wire_id.pop(record.wire_id, None)
        self.admission.queue.discard(record)
        self._has_room = bool(self.admission.queue)
        num_output = len(record.output_token_ids)
        explanations = self.router.explanations
        explanations.note_end(record.request_id, state, num_output, self._now_ns)

    def _fail(
        self, record: RequestRecord, reason: str, retry_after_s: float | None = None
    ) -> list[Command]:
        self._end(record, RequestState.FAILED)
        failed = RequestFailed(
            request_id=record.request_id, reason=reason, retry_after_s=retry_after_s
        )
        return [Send(FRONT, failed)]

    # --------------------------------------------------------------------------------------- faults

    def _lose(self, event: WorkerLost, now_ns: int) -> list[Command]:
        """Forget a dead worker, tell the others, and retry what it had."""
        worker, commands = membership.lose(self.fleet, event)
        if worker is None:
            return []
        reason = f"worker {event.worker_id} was lost ({event.reason})"
        for record in list(self.requests.values()):
            if record.needs(worker):
                commands += self._retry(record, reason, now_ns)
        return commands

    def _take_failure(self, event: RequestFailed, now_ns: int) -> list[Command]:
        record = self._by_wire_id.get(event.request_id)
        if record is None:
            return []
        if event.is_retryable:
            return self._retry(record, event.reason, now_ns)
        return self._call_off(record) + self._fail(record, event.reason)

    def _take_expired(self, event: Expired, now_ns: int) -> list[Command]:
        """Begin anew unless somebody decodes it: then only the word of it was lost."""
        record = self._by_wire_id.get(event.request_id)
        if record is None or record.state is RequestState.DECODING:
            return []
        reason = f"the offer of {event.worker_id} was not claimed within its lease"
        return self._retry(record, reason, now_ns)

    def _retry(self, record: RequestRecord, reason: str, now_ns: int) -> list[Command]:
        """Begin another attempt with the output so far, or fail when all are used up."""
        commands = self._call_off(record)
        if record.attempts >= self.config.max_attempts:
            return commands + self._fail(record, f"{reason}; tried {record.attempts} times")
        self._totals["retried"] += 1
        self.router.release(record, now_ns)
        self._by_wire_id.pop(record.wire_id, None)
        record.end_attempt()
        return commands + self._queue(record, now_ns)

    def _expire(self, now_ns: int) -> list[Command]:
        """Fail what has waited longer than it may."""
        self._wakes_ns = None
        commands: list[Command] = []
        for record, reason in list(self.admission.expired(now_ns)):
            commands += self._fail(record, reason)
        return commands + (self._wake(now_ns) if self.admission.queue else [])

    def _wake(self, now_ns: int) -> list[Command]:
        """Ask to be woken for the first wait that may end; one at a time is enough."""
        at_ns = now_ns + self.config.queue_timeout_ns
        if self._wakes_ns is not None and self._wakes_ns <= at_ns:
            return []
        self._wakes_ns = at_ns
        return [WakeAt(at_ns, _QUEUE_KEY)]

    # ---------------------------------------------------------------------------------------- roles

    def _look(self, now_ns: int) -> list[Command]:
        """Let workers change sides, come or go if that helps; look again while there is work."""
        self._is_looking = False
        if membership.relabel(self.fleet, self.roles.look(now_ns)):
            self._has_room = bool(self.admission.queue)
        commands = self.relocation.look(self.requests.values(), now_ns)
        commands += [] if self.admission.is_draining else self.sizing.look(now_ns)
        is_needed = self.requests or self.sizing.is_needed
        return commands + (self._look_again(now_ns) if is_needed else [])

    def _look_again(self, now_ns: int) -> list[Command]:
        if self._is_looking or not self.roles.is_needed:
            return []
        self._is_looking = True
        return [WakeAt(now_ns + int(self.config.role_interval_ms * NS_PER_MS), _ROLES_KEY)]

    def check(self) -> None:
        """Assert that the books balance."""
        assert len(self._by_wire_id) + len(self.admission.queue) == len(self.requests)
        for wire_id, record in self._by_wire_id.items():
            assert record.wire_id == wire_id, (wire_id, record.wire_id)
            assert self.requests[record.request_id] is record, wire_id
        audit(self._totals, self.requests, self.admission.queue, self.fleet)
        assert len(self.requests) <= self.config.max_queued
