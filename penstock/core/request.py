"""A request as every part of the program sees it, and the timeline that explains its latency.

`Request` and `SamplingParams` are immutable and travel between processes; whoever works on a
request keeps its own mutable record beside it. `Timeline` stamps are nanoseconds of the host's
monotonic clock, which all processes of one host share.
"""

from enum import Enum
from typing import Final

from msgspec import Struct

from penstock.core.block import root_hash
from penstock.core.types import NS_PER_S, BlockHash, RequestId


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Defaults are those of the OpenAI API; greedy is `temperature=0`.

    `seed` is None only until the front end has drawn one: workers always see a number, so that any
    of them continues the same sequence. `logprobs` is the number of alternatives to report per
    token (None reports nothing). `stop` strings are looked for where text exists (front end);
    `stop_token_ids` by the worker.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """True when every token is the arg max."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to continue.

    `output_token_ids` is not empty when the request is continued after a preemption, a migration or
    a lost worker; `params.max_tokens` counts them. `cache_salt` separates tenants in the prefix
    cache, and so does `accepts_loss`: KV may come back from a tier by way of a lossy codec. With a
    `kv_window` decoding looks at the first block and the last so many tokens alone; with a
    `kv_select` at about so many tokens of the prompt, those that its end looks at most. Its KV is
    to be kept for `retention_ns` after its end, before all others' if it is a `pin`. A lower
    `priority` is more urgent; requests of one `fairness_key` share what keys are given in turn. The
    SLOs, in ms, are those of the cluster where there are none.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    accepts_loss: bool = False
    kv_window: int = 0
    kv_select: int = 0
    retention_ns: int = 0
    pin: str = ""
    priority: int = 0
    arrived_ns: int = 0
    fairness_key: str = ""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None

    @property
    def root(self) -> BlockHash:
        """The name that is before that of its first block."""
        return root_hash(self.cache_salt, accepts_loss=self.accepts_loss, kv_window=self.kv_window)

    @property
    def pin_id(self) -> str:
        """What its pin is called: tenants have names of their own."""
        return f"{self.cache_salt}/{self.pin}"

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


class RequestState(Enum):
    """Where a request stands in the cluster, as the controller knows it."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDINGS = frozenset({RequestState.FINISHED, RequestState.ABORTED, RequestState.FAILED})

REQUEST_TRANSITIONS: Final[dict[RequestState, frozenset[RequestState]]] = {
    # A single worker that does both goes from queued straight to decoding; a lost worker puts a
    # request back in the queue. What decodes may be handed on to another worker.
    RequestState.QUEUED: frozenset({RequestState.PREFILLING, RequestState.DECODING}) | _ENDINGS,
    RequestState.PREFILLING: frozenset({RequestState.HANDING_OFF, RequestState.QUEUED}) | _ENDINGS,
    RequestState.HANDING_OFF: frozenset({RequestState.DECODING, RequestState.QUEUED}) | _ENDINGS,
    RequestState.DECODING: frozenset({RequestState.HANDING_OFF, RequestState.QUEUED}) | _ENDINGS,
    RequestState.FINISHED: frozenset(),
    RequestState.ABORTED: frozenset(),
    RequestState.FAILED: frozenset(),
}


class Timeline(Struct, kw_only=True, omit_defaults=True):
    """Stamps of one request in nanoseconds, 0 where it did not pass. Filled in as the request
    travels. `held_ns` is when the decode worker gave it blocks, which may be long before there is
    anything to put into them (`reserved_ns` counts from the offer on). `exposed_ns` is how long it
    waited for blocks out of tiers although it was its turn: a part of what is called queue;
    `exposed_decode_ns` of it for a codec. `pull_copy_ns` is how long bytes were copied, in all
    parts of a pull together. `selected_tokens` are those of the prompt whose KV was kept where a
    request wanted no more than a part of it.

    Consecutive differences are the parts of TTFT (`ledger`), so they add up by construction; what
    the client saw beyond them is the residual.
    """

    arrived_ns: int = 0
    prefill_started_ns: int = 0
    offered_ns: int = 0
    offer_received_ns: int = 0
    reserved_ns: int = 0
    held_ns: int = 0
    pulled_ns: int = 0
    first_token_ns: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = ""
    pull_bytes: int = 0
    pull_spans: int = 0
    pull_moves: int = 0
    pull_copy_ns: int = 0
    pull_verified: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    exposed_ns: int = 0
    exposed_decode_ns: int = 0
    selected_tokens: int = 0

    def take_prefill(self, other: "Timeline") -> None:
        """Take over what the prefill worker has stamped since this was sent."""
        self.prefill_started_ns = other.prefill_started_ns
        self.offered_ns = other.offered_ns
        self.cached_tokens = other.cached_tokens
        self.exposed_ns = other.exposed_ns
        self.exposed_decode_ns = other.exposed_decode_ns
        self.selected_tokens = other.selected_tokens
        self.pull_copy_ns = max(self.pull_copy_ns, other.pull_copy_ns)  # one side of the two copies

    def take_pull(self, transport: str, num_bytes: int, num_spans: int, *, copied_ns: int) -> None:
        """Count a part of the pull that has landed, and the time that copying it took."""
        if num_spans:
            parts = [*self.transport.split("+"), *transport.split("+")]
            self.transport = "+".join(dict.fromkeys(filter(None, parts)))
        self.pull_bytes += num_bytes
        self.pull_spans += num_spans
        self.pull_moves += 1
        self.pull_copy_ns += copied_ns

    @property
    def pull_bytes_per_s(self) -> float:
        """Rate at which the KV was copied; 0 where nothing was."""
        return self.pull_bytes * NS_PER_S / self.pull_copy_ns if self.pull_copy_ns > 0 else 0.0

    def ledger(self, delivered_ns: int) -> dict[str, float]:
        """Return the parts of TTFT in seconds; they and `residual` add up to `ttft`.

        `delivered_ns` is when the first token left towards the client. A request that one worker
        served alone has no offer, wait or pull, and its first decode is part of its prefill.
        """
        stamps = [
            ("queue", self.prefill_started_ns),
            ("prefill", self.offered_ns),
            ("offer", self.offer_received_ns),
            ("wait_for_room", self.reserved_ns),
            ("pull", self.pulled_ns),
            ("first_decode", self.first_token_ns),
        ]
        if not self.offered_ns:
            stamps = [("queue", self.prefill_started_ns), ("prefill", self.first_token_ns)]
        parts: dict[str, float] = {}
        before = self.arrived_ns
        for name, stamp in stamps:
            parts[name] = (stamp - before) / NS_PER_S
            before = stamp
        parts["residual"] = (delivered_ns - before) / NS_PER_S
        parts["ttft"] = (delivered_ns - self.arrived_ns) / NS_PER_S
        return parts
