"""Why a request went where it went, and what came of it: what `Controller.explain` returns.

Times are in milliseconds, for people; nothing decides by these.
"""

from msgspec import Struct

from penstock.core.types import RequestId, WorkerId


class Candidate(Struct, frozen=True, kw_only=True):
    """A worker that was considered for one part of a request. `cost_ms` is what the policy compared
    (None where it compares something else); `closed` says why it could not be taken, if so.
    """

    worker_id: WorkerId
    part: str
    cost_ms: float | None
    cached_tokens: int
    closed: str = ""


class Parts(Struct, frozen=True, kw_only=True):
    """The parts of a time to first token, and the time per token after it."""

    queue_ms: float
    prefill_ms: float
    transfer_ms: float
    first_decode_ms: float
    ttft_ms: float
    tpot_ms: float


class Explanation(Struct, frozen=True, kw_only=True):
    """One request's latest assignment. `waited_ms` is how long it had waited for it.

    `actual` is there once it has its first token (`tpot_ms` is 0 until the last one), `outcome`
    once it is over.
    """

    request_id: RequestId
    policy: str
    attempt: int
    num_tokens: int
    expected_output_tokens: int
    prefill_worker: WorkerId
    decode_worker: WorkerId
    waited_ms: float
    predicted: Parts
    candidates: tuple[Candidate, ...]
    actual: Parts | None = None
    outcome: str = ""

    @property
    def is_alone(self) -> bool:
        """True when one worker did both parts."""
        return self.prefill_worker == self.decode_worker


class Accuracy(Struct, frozen=True, kw_only=True):
    """How good predictions were, as totals since the start: divide two of them by each other.

    Relative errors are |predicted - actual| over the larger of the two. `step_error` and
    `transfer_error` are means of late, of the absolute logarithm of actual over predicted.
    """

    ttft_count: int = 0
    ttft_predicted_s: float = 0.0
    ttft_actual_s: float = 0.0
    ttft_relative_error: float = 0.0
    tpot_count: int = 0
    tpot_predicted_s: float = 0.0
    tpot_actual_s: float = 0.0
    tpot_relative_error: float = 0.0
    step_error: float = 0.0
    transfer_error: float = 0.0
