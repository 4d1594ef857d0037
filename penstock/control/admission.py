"""`Admission`: whether a request is taken, where it waits when nobody is open, and who is given up
when there are too many.

A request that would miss its SLO is refused at once, with the time after which it would not: better
than to let it, and those behind it, be late. What it would see is predicted, from the same
books as routing, and only where somebody has said what is too late (`slo_ttft_ms` of the cluster or
of the request). The queue is bounded: when it is full, a more urgent request takes the place of the
least urgent one.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

from penstock.control.cost import A, B, C
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.queue import FairQueue
from penstock.control.record import RequestRecord
from penstock.control.router import Router
from penstock.core.config import ControllerConfig
from penstock.core.errors import (
    CapacityExceeded,
    PenstockError,
    PromptTooLong,
    WorkersUnavailable,
)
from penstock.core.request import Request
from penstock.core.types import NS_PER_MS, NS_PER_S

RETRY_MIN_S: Final = 0.1
RETRY_MAX_S: Final = 600.0


class Admission:
    """The queue at the controller and its door."""

    def __init__(self, config: ControllerConfig, fleet: Fleet, router: Router) -> None:
        self.queue = FairQueue()
        self.is_draining = False
        self._config = config
        self._fleet = fleet
        self._router = router

    def refusal(
        self, request: Request, num_live: int, now_ns: int, expected_ns: float
    ) -> PenstockError | None:
        """Say why `request` would not be taken now, or None. Changes nothing.

        `expected_ns` is its TTFT as this module predicts it.
        """
        if self.is_draining:
            return WorkersUnavailable("the server is shutting down")
        holds_tokens = self._fleet.capacity_least
        if request.num_tokens + 1 > holds_tokens:
            return PromptTooLong(
                f"the prompt has {request.num_tokens} tokens, a worker's KV cache holds "
                f"{holds_tokens}: serve with more --kv-cache-memory",
                field="messages",
            )
        if num_live >= self._config.max_queued and not self._victim(request):
            return CapacityExceeded(
                f"{num_live} requests are under way, the most this server takes",
                self._retry_after(request, now_ns),
            )
        return self._lateness(request, expected_ns)

    def expected_ns(self, request: Request, now_ns: int) -> float:
        """Return the predicted TTFT of a request that has an SLO for it, else 0."""
        if not (request.slo_ttft_ms or self._config.slo_ttft_ms):
            return 0.0
        return self._predicted_ns(request, now_ns)

    def victim(self, request: Request, num_live: int) -> RequestRecord | None:
        """Return the queued request to be given up so that a more urgent one can come in."""
        return self._victim(request) if num_live >= self._config.max_queued else None

    def expired(self, now_ns: int) -> Iterable[tuple[RequestRecord, str]]:
        """Return those that have waited too long, and for what."""
        has_workers = any(map(self._fleet.is_candidate, self._fleet))
        config = self._config
        limit_ns = config.wait_timeout_ns if has_workers else config.queue_timeout_ns
        reason = "no worker had room in time" if has_workers else "no worker came up in time"
        late = [r for r in self.queue if r.queued_ns <= now_ns - limit_ns]
        return [(record, reason) for record in late]

    def wait_ns(self, request: Request, now_ns: int) -> float:
        """Return how long a new request would wait until it begins, at the controller and at its
        worker: until those before it are prefilled, and until a seat is free.
        """
        fleet, queue = self._fleet, self.queue
        num_before = queue.tokens_before(request.priority)
        prompts = (fleet.prefill_closed if fleet.has_pairs else fleet.alone_closed) < CLOSED
        slots = [w.slot for w in fleet if fleet.is_candidate(w) and self._computes(w.slot)]
        if not slots:
            return 0.0
        waits = fleet.wait_ns(now_ns)[slots]
        has_turn = not num_before and bool(prompts[slots].any())
        if has_turn and self._router.has_seat(request, now_ns):
            return float(waits.min())
        prompts_ns = float(waits.mean()) + self._queued_ns(num_before, slots)
        if self._router.has_seat(request, now_ns):
            return prompts_ns
        return max(prompts_ns, self._seat_wait_ns(len(queue)))

    def _computes(self, slot: int) -> bool:
        """True for workers that are meant to compute prompts."""
        return not (self._fleet.has_pairs and self._fleet.alone_charge[slot])

    def _queued_ns(self, num_tokens: int, slots: list[int]) -> float:
        """Return how long these workers take together for so many tokens of those that wait, which
        are prompts of the length usual in the queue, whatever the length of who asks.
        """
        if not num_tokens:
            return 0.0
        usual_tokens = self.queue.num_tokens / len(self.queue)
        return num_tokens / float((1 / self._token_ns(usual_tokens)[slots]).sum())

    def _token_ns(self, num_tokens: float) -> Float64:
        """Return the time per token of a prompt of this length, of each slot."""
        coefficients = self._fleet.coefficients
        each: Float64 = coefficients[A] / num_tokens + coefficients[B]
        each += coefficients[C] * num_tokens
        return each

    def _seat_wait_ns(self, num_before: int) -> float:
        """Return how long it takes until so many sequences have ended."""
        fleet = self._fleet
        decodes = [w for w in fleet if fleet.is_candidate(w) and w.num_decodes]
        if not decodes:
            return 0.0
        step_ns = float(np.mean([fleet.step[w.slot] for w in decodes]))
        num_running = sum(w.num_decodes for w in decodes)
        # Half of what an answer is expected to take is counted as context from the beginning.
        num_tokens = 2 * sum(w.kv_tokens - w.context_tokens for w in decodes) / num_running
        return (num_before + 1) * num_tokens * step_ns / num_running

    def _lateness(self, request: Request, expected_ns: float) -> CapacityExceeded | None:
        slo_ms = request.slo_ttft_ms or self._config.slo_ttft_ms
        if not slo_ms:
            return None
        predicted_ms = expected_ns * self._router.explanations.optimism / NS_PER_MS
        if predicted_ms <= slo_ms * self._config.slo_slack:
            return None
        return CapacityExceeded(
            f"the first token would take {predicted_ms:.0f} ms, the limit is {slo_ms:.0f}",
            _bounded((predicted_ms - slo_ms) / 1e3),
        )

    def _predicted_ns(self, request: Request, now_ns: int) -> float:
        """Return the expected TTFT of a new request: of its choice, or of waiting for its turn."""
        own_ns = self._router.expected_ttft_ns(request, now_ns)
        if own_ns is not None and not len(self.queue):
            return own_ns
        slots = [w.slot for w in self._fleet if self._fleet.is_candidate(w)]
        if not slots:
            return 0.0  # the cluster is coming up, which says nothing about how busy it will be
        compute_ns = request.num_tokens * float(self._token_ns(request.num_tokens)[slots].min())
        return self.wait_ns(request, now_ns) + compute_ns

    def _retry_after(self, request: Request, now_ns: int) -> float:
        return _bounded(self.wait_ns(request, now_ns) / NS_PER_S)

    def _victim(self, request: Request) -> RequestRecord | None:
        last = self.queue.last()
        return last if last is not None and last.request.priority > request.priority else None


def _bounded(seconds: float) -> float:
    return min(max(seconds, RETRY_MIN_S), RETRY_MAX_S)
