"""`Controller`: the core that decides for the cluster.

Owns the table of live requests and of workers that are up. It admits, routes, cancels, retries on
another worker what a lost one had (with the tokens that the client already got, so the stream goes
on), and tells the front end how it ended. Sampling depends on seed and position alone, so a
continued request gets the very tokens it would have got.
"""

from penstock.control.record import RequestRecord, WorkerRecord
from penstock.control.router import choose
from penstock.core.config import ControllerConfig
from penstock.core.errors import (
    CapacityExceeded,
    PenstockError,
    PromptTooLong,
    WorkersUnavailable,
)
from penstock.core.events import (
    Command,
    Drain,
    Event,
    Retire,
    Send,
    WakeAt,
    Woken,
    WorkerLost,
    WorkerSuspected,
)
from penstock.core.messages import (
    Assign,
    BlocksChanged,
    Cancel,
    Expired,
    Hello,
    Load,
    Offered,
    PeerDown,
    PeerUp,
    RequestFailed,
    Stop,
    Submit,
    TokenOutput,
    Tokens,
    WorkerInfo,
)
from penstock.core.request import Request, RequestState, Timeline
from penstock.core.service import ClusterStatus, WorkerStatus
from penstock.core.types import FRONT, RequestId, WorkerId

_QUEUE_KEY = "queue"


class Controller:
    """The core of the cluster. `handle` is the only way in; `refusal` and `status` only look."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.requests: dict[RequestId, RequestRecord] = {}
        self._by_wire_id: dict[RequestId, RequestRecord] = {}
        self._queue: dict[RequestId, RequestRecord] = {}
        self._totals = dict.fromkeys(("arrived", "finished", "aborted", "failed", "retried"), 0)
        self._is_draining = False

    # -------------------------------------------------------------------------------------- queries

    def refusal(self, request: Request) -> PenstockError | None:
        """Say why `request` would not be taken now, or None. Changes nothing."""
        if self._is_draining:
            return WorkersUnavailable("the server is shutting down")
        if len(self.requests) >= self.config.max_queued:
            return CapacityExceeded(
                f"{len(self.requests)} requests are under way, the most this server takes", 1.0
            )
        limits = [w.info.capacity_tokens for w in self.workers.values()]
        if limits and request.num_tokens + 1 > min(limits):
            return PromptTooLong(
                f"the prompt has {request.num_tokens} tokens, a worker's KV cache holds "
                f"{min(limits)}: serve with more --kv-cache-memory",
                field="messages",
            )
        return None

    def status(self) -> ClusterStatus:
        """Return the cluster as of now."""
        states = [record.state for record in self.requests.values()]
        return ClusterStatus(
            workers=tuple(
                WorkerStatus(
                    info=w.info,
                    assigned=w.num_requests,
                    load=w.load,
                    is_leaving=w.is_leaving,
                    is_suspected=w.is_suspected,
                )
                for w in self.workers.values()
            ),
            queued=states.count(RequestState.QUEUED),
            prefilling=states.count(RequestState.PREFILLING),
            handing_off=states.count(RequestState.HANDING_OFF),
            decoding=states.count(RequestState.DECODING),
            is_draining=self._is_draining,
            **self._totals,
        )

    # --------------------------------------------------------------------------------------- events

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in; return what to tell workers and the front end."""
        commands = self._react(event, now_ns)
        for worker in [w for w in self.workers.values() if w.is_leaving]:
            commands += self._dismiss_if_idle(worker)
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
                return self._note_offered(wire_id)
            case Load(worker_id=worker_id):
                if worker_id in self.workers:
                    self.workers[worker_id].load = event
                return []
            case BlocksChanged():
                return []
            case RequestFailed():
                return self._take_failure(event, now_ns)
            case Expired():
                return self._take_expired(event, now_ns)
            case Hello(info=info):
                return self._welcome(info, now_ns)
            case WorkerLost():
                return self._lose(event, now_ns)
            case WorkerSuspected():
                return self._suspect(event)
            case Retire(worker_id=worker_id, epoch=epoch):
                return self._retire(worker_id, epoch)
            case Drain():
                self._is_draining = True
                return []
            case Woken():
                return self._expire(now_ns)
            case _:
                raise AssertionError(f"a {type(event).__name__} is not for the controller")

    def _submit(self, request: Request, now_ns: int) -> list[Command]:
        self._totals["arrived"] += 1
        refusal = self.refusal(request)
        if refusal is not None:
            self._totals["failed"] += 1
            return [Send(FRONT, RequestFailed(request_id=request.request_id, reason=str(refusal)))]
        assert request.request_id not in self.requests, request.request_id
        record = RequestRecord(request, now_ns)
        self.requests[request.request_id] = record
        return self._place(record, now_ns)

    def _place(self, record: RequestRecord, now_ns: int) -> list[Command]:
        """Assign a queued request to workers, or keep it queued until one comes up or its time is
        over.
        """
        pair = choose(self._candidates(), record.num_tokens)
        if pair is None:
            self._queue[record.request_id] = record
            record.queued_ns = now_ns
            return [WakeAt(now_ns + self.config.queue_timeout_ns, _QUEUE_KEY)]
        self._queue.pop(record.request_id, None)
        prefill_worker, decode_worker = pair
        request = record.begin_attempt(self.workers[prefill_worker], self.workers[decode_worker])
        self._by_wire_id[record.wire_id] = record
        is_alone = prefill_worker == decode_worker
        record.move_to(RequestState.DECODING if is_alone else RequestState.PREFILLING)
        self._count(record, 1)
        timeline = Timeline(
            arrived_ns=record.arrived_ns,
            prefill_worker=prefill_worker,
            prompt_tokens=len(request.prompt_token_ids),
        )
        assign = Assign(request=request, decode_worker=decode_worker, timeline=timeline)
        return [Send(prefill_worker, assign)]

    def _candidates(self) -> list[WorkerRecord]:
        """Return the workers that may get a request: those that are heard, if there are any."""
        staying = [worker for worker in self.workers.values() if not worker.is_leaving]
        return [worker for worker in staying if not worker.is_suspected] or staying

    def _count(self, record: RequestRecord, sign: int) -> None:
        """Book a request's expected work on its workers, or take it off again (`sign` -1).

        Prefill work is on the books while the state is PREFILLING; KV space on the decode worker
        from assignment on, with the output that may still come.
        """
        prefill, decode = record.prefill, record.decode
        if prefill is not None and record.state is RequestState.PREFILLING:
            prefill.prefill_tokens += sign * record.request.num_tokens
        if decode is not None:
            expected = record.request.num_tokens + record.request.params.max_tokens
            decode.decode_tokens += sign * expected
            decode.num_requests += sign
        if prefill is not None and prefill is not decode:
            prefill.num_requests += sign

    def _note_offered(self, wire_id: RequestId) -> list[Command]:
        record = self._by_wire_id.get(wire_id)
        if record is not None and record.state is RequestState.PREFILLING:
            assert record.prefill is not None, wire_id
            record.prefill.prefill_tokens -= record.request.num_tokens
            record.move_to(RequestState.HANDING_OFF)
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
            record.output_token_ids += output.token_ids
            if record.state is not RequestState.DECODING:
                self._start_decoding(record)
            outputs.append(_under_own_id(record, output))
            if output.finish_reason is not None:
                self._end(record, RequestState.FINISHED)
        if outputs:
            tokens = Tokens(worker_id=event.worker_id, outputs=tuple(outputs))
            commands.append(Send(FRONT, tokens))
        return commands

    def _start_decoding(self, record: RequestRecord) -> None:
        """The first token may overtake the prefill worker's word that it has offered."""
        if record.state is RequestState.PREFILLING:
            self._note_offered(record.wire_id)
        record.move_to(RequestState.DECODING)

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
        self._count(record, -1)
        record.move_to(state)
        self._totals[state.value] += 1
        del self.requests[record.request_id]
        self._by_wire_id.pop(record.wire_id, None)
        self._queue.pop(record.request_id, None)

    # --------------------------------------------------------------------------- workers and faults

    def _welcome(self, info: WorkerInfo, now_ns: int) -> list[Command]:
        """Introduce a new worker and the others to each other, and give it what was queued."""
        peers = list(self.workers.values())
        refusal = info.layout.incompatibility(peers[0].info.layout) if peers else None
        if refusal is not None:
            return [Send(info.worker_id, Stop(reason=refusal))]
        self.workers[info.worker_id] = WorkerRecord(info)
        commands: list[Command] = []
        for peer in peers:
            commands.append(Send(peer.info.worker_id, PeerUp(info=info)))
            commands.append(Send(info.worker_id, PeerUp(info=peer.info)))
        for record in list(self._queue.values()):
            commands += self._place(record, now_ns)
        return commands

    def _lose(self, event: WorkerLost, now_ns: int) -> list[Command]:
        """Forget a dead worker, tell the others, and retry what it had."""
        worker = self.workers.get(event.worker_id)
        if worker is None or worker.info.epoch != event.epoch:
            return []
        del self.workers[event.worker_id]
        down = PeerDown(worker_id=event.worker_id, epoch=event.epoch)
        commands: list[Command] = [Send(other, down) for other in self.workers]
        reason = f"worker {event.worker_id} was lost ({event.reason})"
        for record in list(self.requests.values()):
            if record.needs(worker):
                commands += self._retry(record, reason, now_ns)
        return commands

    def _suspect(self, event: WorkerSuspected) -> list[Command]:
        worker = self.workers.get(event.worker_id)
        if worker is not None and worker.info.epoch == event.epoch:
            worker.is_suspected = event.is_suspected
        return []

    def _retire(self, worker_id: WorkerId, epoch: int) -> list[Command]:
        worker = self.workers.get(worker_id)
        if worker is not None and worker.info.epoch == epoch:
            worker.is_leaving = True
        return []

    def _dismiss_if_idle(self, worker: WorkerRecord) -> list[Command]:
        """Let a leaving worker go when no request needs it any more. O(live requests)."""
        if any(record.needs(worker) for record in self.requests.values()):
            return []
        info = worker.info
        del self.workers[info.worker_id]
        down = PeerDown(worker_id=info.worker_id, epoch=info.epoch)
        return [Send(info.worker_id, Stop()), *(Send(other, down) for other in self.workers)]

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
        self._count(record, -1)
        self._by_wire_id.pop(record.wire_id, None)
        record.prefill = record.decode = None
        record.move_to(RequestState.QUEUED)
        return commands + self._place(record, now_ns)

    def _fail(self, record: RequestRecord, reason: str) -> list[Command]:
        self._end(record, RequestState.FAILED)
        return [Send(FRONT, RequestFailed(request_id=record.request_id, reason=reason))]

    def _expire(self, now_ns: int) -> list[Command]:
        """Fail what has waited for a worker longer than it may."""
        oldest_ns = now_ns - self.config.queue_timeout_ns
        expired = [record for record in self._queue.values() if record.queued_ns <= oldest_ns]
        return [c for r in expired for c in self._fail(r, "no worker came up in time")]

    def check(self) -> None:
        """Assert that the books balance."""
        totals = self._totals
        ended = totals["finished"] + totals["aborted"] + totals["failed"]
        assert totals["arrived"] == ended + len(self.requests), (totals, len(self.requests))
        for record in self.requests.values():
            is_queued = record.state is RequestState.QUEUED
            assert is_queued == (record.request_id in self._queue), record.request_id
            assert is_queued or self._by_wire_id[record.wire_id] is record, record.request_id
        assert len(self._by_wire_id) + len(self._queue) == len(self.requests)
        if not self.requests:
            for worker in self.workers.values():
                books = (worker.prefill_tokens, worker.decode_tokens, worker.num_requests)
                assert books == (0, 0, 0), (worker.info.worker_id, books)
        assert len(self.requests) <= self.config.max_queued


def _under_own_id(record: RequestRecord, output: TokenOutput) -> TokenOutput:
    if output.request_id == record.request_id:
        return output
    return TokenOutput(
        record.request_id,
        output.token_ids,
        output.logprobs,
        output.finish_reason,
        output.timeline,
    )
