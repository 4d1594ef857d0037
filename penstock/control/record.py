"""What the controller remembers: `RequestRecord` of each live request, `WorkerRecord` of each
worker that is up.
"""

from penstock.core.messages import Load, WorkerInfo
from penstock.core.request import REQUEST_TRANSITIONS, Request, RequestState
from penstock.core.types import RequestId, WorkerId


class WorkerRecord:
    """A worker that is up, and how much of its time is spoken for.

    `prefill_tokens` are tokens assigned to it whose prefill is not known to be done;
    `decode_tokens` are the KV slots that the requests decoding there, or on their way, take now;
    `num_requests` counts both. One that is leaving gets nothing new.
    """

    __slots__ = (
        "decode_tokens",
        "info",
        "is_leaving",
        "is_suspected",
        "load",
        "num_requests",
        "prefill_tokens",
    )

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.load: Load | None = None
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.num_requests = 0
        self.is_leaving = False
        self.is_suspected = False


class RequestRecord:
    """A live request. Workers know it by `wire_id`, which is new for every attempt.

    `prefill` and `decode` are the very incarnations that serve it: what is booked on one that has
    died is not taken off its successor of the same name.

    A worker that was too late for a cancel, or speaks of an attempt that was given up, therefore
    names an id that nobody knows any more, and can never be taken for the current attempt.
    """

    __slots__ = (
        "arrived_ns",
        "attempts",
        "decode",
        "output_token_ids",
        "prefill",
        "queued_ns",
        "request",
        "state",
        "wire_id",
    )

    def __init__(self, request: Request, now_ns: int) -> None:
        self.request = request
        self.state = RequestState.QUEUED
        self.wire_id = request.request_id
        self.arrived_ns = request.arrived_ns or now_ns
        self.queued_ns = now_ns
        self.attempts = 0
        self.prefill: WorkerRecord | None = None
        self.decode: WorkerRecord | None = None
        self.output_token_ids: list[int] = []

    @property
    def request_id(self) -> RequestId:
        """The id that the client's side knows."""
        return self.request.request_id

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """The workers that hold something of this request."""
        pair = (self.prefill, self.decode)
        return tuple(dict.fromkeys(w.info.worker_id for w in pair if w is not None))

    def needs(self, worker: WorkerRecord) -> bool:
        """True while this request could not go on without that worker."""
        is_past_prefill = self.state is RequestState.DECODING
        return worker is self.decode or (worker is self.prefill and not is_past_prefill)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    def move_to(self, state: RequestState) -> None:
        """Change state along the table."""
        assert state in REQUEST_TRANSITIONS[self.state], (self.request_id, self.state, state)
        self.state = state

    def begin_attempt(self, prefill: WorkerRecord, decode: WorkerRecord) -> Request:
        """Note who serves it from now on; return the request to send, with the output so far."""
        if self.attempts:
            self.wire_id = RequestId(f"{self.request_id}~{self.attempts}")
        self.attempts += 1
        self.prefill, self.decode = prefill, decode
        if not self.output_token_ids and self.wire_id == self.request_id:
            return self.request
        original = self.request
        return Request(
            request_id=self.wire_id,
            prompt_token_ids=original.prompt_token_ids,
            params=original.params,
            output_token_ids=tuple(self.output_token_ids),
            cache_salt=original.cache_salt,
            priority=original.priority,
            arrived_ns=original.arrived_ns,
        )
