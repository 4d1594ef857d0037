"""What the controller remembers: `RequestRecord` of each live request, `WorkerRecord` of each
worker that is up.
"""

from typing import Final

from msgspec import Struct, structs

from penstock.control.cost import WorkerCost
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Send
from penstock.core.messages import Assign, Load, TokenOutput
from penstock.core.request import REQUEST_TRANSITIONS, Request, RequestState, Timeline
from penstock.core.types import RequestId, Role, WorkerId

BLOCKS_AHEAD: Final = 1.5
"""Of a sequence that decodes: half of its last one, and one that is kept free for it to grow."""
SEATS_AHEAD: Final = 1.125
"""Decodes on a worker over those that run at once: some of them are still on their way."""


class WorkerRecord:
    """A worker that is up, and how much of its time is spoken for. Whoever changes a book here says
    so to the fleet (`Fleet.refresh`), which keeps columns of them for the router.

    `slot` is its row there. `role` is a label that may change; it is `is_pinned` when nobody but a
    person may do so. One that is leaving gets nothing new; one that is suspected gets nothing while
    there is another.

    `prefill_tokens` are tokens assigned to it whose prefill is not known to be done, `backlog_ns`
    the time expected for them, `free_at_ns` when it should be through. `decode_tokens` are the KV
    slots that the requests decoding there, or on their way, take at most, `kv_tokens` what they are
    expected to, `held_tokens` what they do so far, `context_tokens` what they look at;
    `num_decodes` counts them. `arriving_tokens` are those of prompts whose KV is to come from
    another worker and is not known to be there, `arriving_bytes` as many as take that
    long over the usual link.
    `num_requests` counts all.
    """

    __slots__ = (
        "_ahead_tokens",
        "arriving_bytes",
        "arriving_tokens",
        "backlog_ns",
        "capacity_tokens",
        "context_tokens",
        "cost",
        "decode_coefficients",
        "decode_tokens",
        "free_at_ns",
        "held_tokens",
        "info",
        "is_leaving",
        "is_pinned",
        "is_suspected",
        "kv_tokens",
        "load",
        "num_decodes",
        "num_prefills",
        "num_requests",
        "prefill_coefficients",
        "prefill_tokens",
        "role",
        "seats_max",
        "slot",
        "spare_at_ns",
    )

    def __init__(self, info: WorkerInfo, slot: int) -> None:
        self.info = info
        self.slot = slot
        self.role: Role = info.role
        self.is_pinned = False
        self.is_leaving = False
        self.is_suspected = False
        self.load: Load | None = None
        self.cost = WorkerCost(info.profile)
        self.prefill_coefficients = (0.0, 0.0, 0.0)
        """a, b and c of its prefills, in ns."""
        self.decode_coefficients = (0.0, 0.0, 0.0)
        """d, e and f of its decode steps, in ns."""
        self.capacity_tokens = info.capacity_tokens
        self.seats_max = info.max_num_seqs * SEATS_AHEAD
        self._ahead_tokens = info.layout.block_size * BLOCKS_AHEAD
        self.prefill_tokens = 0
        self.num_prefills = 0
        self.backlog_ns = 0.0
        self.free_at_ns = 0.0
        self.spare_at_ns = 0.0
        """When what it decodes has made up for the prompts that it has computed beside."""
        self.arriving_tokens = 0
        self.arriving_bytes = 0.0
        self.decode_tokens = 0
        self.num_decodes = 0
        self.context_tokens = 0
        self.kv_tokens = 0
        self.held_tokens = 0
        self.num_requests = 0

    @property
    def step_ns(self) -> float:
        """The time of a decode step with one sequence more, without that one's context."""
        fixed, per_sequence, per_token = self.decode_coefficients
        return fixed + per_sequence * (self.num_decodes + 1) + per_token * self.context_tokens

    def step_with_ns(self, num_tokens: int) -> float:
        """Return the same with one of so many tokens."""
        return self.step_ns + self.decode_coefficients[2] * num_tokens

    @property
    def taken_tokens(self) -> float:
        """Tokens of its pool that nobody else can have: those that its sequences are expected to
        hold, or hold already, since those that go on are those that turn out longer.
        """
        held_tokens = self.held_tokens + self.num_decodes * self._ahead_tokens
        return held_tokens if held_tokens > self.kv_tokens else self.kv_tokens


class Booking(Struct, gc=False):
    """What one attempt of a request has put on its workers' books; taken off as it was put on."""

    prefill_ns: float
    decode_tokens: int
    kv_tokens: int
    context_tokens: int
    is_prefilling: bool = True
    arriving_tokens: int = 0
    arriving_bytes: float = 0.0


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
        "been",
        "booking",
        "decode",
        "early",
        "expected_ns",
        "is_decoding",
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
        self.expected_ns = 0.0
        """TTFT that was predicted when it came; 0 where nobody asked."""
        self.is_decoding = False
        """True from the first token of the attempt on."""
        self.attempts = 0
        self.prefill: WorkerRecord | None = None
        self.decode: WorkerRecord | None = None
        self.booking: Booking | None = None
        self.output_token_ids: list[int] = []
        self.been: tuple[WorkerRecord, ...] = ()
        """Who has had this attempt before; somebody once it was told to go on elsewhere."""
        self.early: list[TokenOutput] | None = None
        """What the other one has said so far; None when it may be heard."""

    @property
    def request_id(self) -> RequestId:
        """The id that the client's side knows."""
        return self.request.request_id

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """The workers that hold something of this request."""
        pair = (self.prefill, self.decode)
        return tuple(dict.fromkeys(w.info.worker_id for w in pair if w is not None))

    @property
    def holders(self) -> tuple[WorkerRecord, ...]:
        """The incarnations on whose books it is."""
        return tuple(w for w in (self.prefill, self.decode) if w is not None)

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
        self.been, self.early = (), None
        if not self.output_token_ids and self.wire_id == self.request_id:
            return self.request
        return structs.replace(
            self.request, request_id=self.wire_id, output_token_ids=tuple(self.output_token_ids)
        )

    def assignment(self, request: Request) -> Send:
        """Return what tells this attempt's workers of `request`, as `begin_attempt` gave it."""
        assert self.prefill is not None
        assert self.decode is not None
        prefill_worker = self.prefill.info.worker_id
        timeline = Timeline(
            arrived_ns=self.arrived_ns,
            prefill_worker=prefill_worker,
            prompt_tokens=len(request.prompt_token_ids),
        )
        decode_worker = self.decode.info.worker_id
        assign = Assign(request=request, decode_worker=decode_worker, timeline=timeline)
        return Send(prefill_worker, assign)

    def end_attempt(self) -> None:
        """Wait for another attempt, with the output so far."""
        self.prefill = self.decode = None
        self.is_decoding = False
        self.move_to(RequestState.QUEUED)

    def under_own_id(self, output: TokenOutput) -> TokenOutput:
        """Return a worker's output under the id that the client's side knows."""
        if output.request_id == self.request_id:
            return output
        return structs.replace(output, request_id=self.request_id)
