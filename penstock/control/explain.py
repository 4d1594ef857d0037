"""`Explanations`: why the latest requests went where they went, what was predicted for them and
what they saw.

A decision is kept as it was made, a few numbers and columns; words are made of it when somebody
asks. Bounded: the oldest request is forgotten first.
"""

from collections import OrderedDict
from typing import Final

import numpy as np
from msgspec import Struct

from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED
from penstock.control.policies import Ask, Choice
from penstock.control.policies.policy import Prediction
from penstock.core.explain import Accuracy, Candidate, Explanation, Parts
from penstock.core.request import RequestState, Timeline
from penstock.core.types import NS_PER_MS, NS_PER_S, RequestId, WorkerId

KEPT_MAX: Final = 1000
OPTIMISM_STEP: Final = 0.03
OPTIMISM_MAX: Final = 4.0
CANDIDATES_MAX: Final = 4
"""Of each part, best first."""


class Decision(Struct, gc=False):
    """One assignment as it was decided, and what came of it. `names` are those of all slots then;
    `expected_ns` is the TTFT that was predicted when the request came, before it had waited.

    `actual_tpot_ns` is 0 until a request of at least two tokens is over.
    """

    request_id: RequestId
    policy: str
    attempt: int
    arrived_ns: int
    ask: Ask
    choice: Choice
    names: tuple[WorkerId, ...]
    prediction: Prediction
    expected_ns: float
    timeline: Timeline | None = None
    first_token_ns: int = 0
    actual_tpot_ns: float = 0.0
    outcome: str = ""

    @property
    def predicted_ttft_ns(self) -> float:
        """From arrival: what it had waited and what was still to come."""
        return self.ask.now_ns - self.arrived_ns + self.prediction.ttft_ns


class Explanations:
    """The latest decisions by request, and how good the predictions were on the whole."""

    def __init__(self) -> None:
        self._decisions: OrderedDict[RequestId, Decision] = OrderedDict()
        self._totals = [0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0]
        self.optimism = 1.0
        """What predicted TTFTs have to be multiplied by so that 9 in 10 are kept, of late."""

    def note(self, decision: Decision) -> None:
        """Keep a decision; a further attempt replaces the one before."""
        self._decisions[decision.request_id] = decision
        self._decisions.move_to_end(decision.request_id)
        if len(self._decisions) > KEPT_MAX:
            self._decisions.popitem(last=False)

    def note_first_token(
        self, request_id: RequestId, timeline: Timeline | None, now_ns: int
    ) -> None:
        """Compare the predicted TTFT with the real one. Later attempts had another start."""
        decision = self._decisions.get(request_id)
        if decision is None:
            return
        decision.first_token_ns = now_ns
        decision.timeline = timeline
        if decision.attempt == 1:
            actual_ns = now_ns - decision.arrived_ns
            self._add(0, decision.predicted_ttft_ns, actual_ns)
            self._follow(actual_ns / max(decision.expected_ns, 1.0))

    def _follow(self, ratio: float) -> None:
        """Move to the 0.9 quantile of the ratios: nine small steps down for one up."""
        step = 1 + OPTIMISM_STEP * (0.9 if ratio > self.optimism else -0.1)
        self.optimism = min(max(self.optimism * step, 1.0), OPTIMISM_MAX)

    def note_end(
        self, request_id: RequestId, state: RequestState, num_output: int, now_ns: int
    ) -> None:
        """Note how it ended, and compare the TPOT of what was finished."""
        decision = self._decisions.get(request_id)
        if decision is None:
            return
        decision.outcome = state.value
        if state is RequestState.FINISHED and num_output > 1 and decision.first_token_ns:
            decision.actual_tpot_ns = (now_ns - decision.first_token_ns) / (num_output - 1)
            if decision.attempt == 1:
                self._add(4, decision.prediction.tpot_ns, decision.actual_tpot_ns)

    def _add(self, at: int, predicted_ns: float, actual_ns: float) -> None:
        totals = self._totals
        totals[at] += 1
        totals[at + 1] += predicted_ns / NS_PER_S
        totals[at + 2] += actual_ns / NS_PER_S
        totals[at + 3] += abs(predicted_ns - actual_ns) / max(actual_ns, predicted_ns, 1.0)

    def accuracy(self, step_error: float, transfer_error: float) -> Accuracy:
        """Return the totals, with the errors of the cost fits, which are not ours."""
        totals = self._totals
        return Accuracy(
            ttft_count=int(totals[0]),
            ttft_predicted_s=totals[1],
            ttft_actual_s=totals[2],
            ttft_relative_error=totals[3],
            tpot_count=int(totals[4]),
            tpot_predicted_s=totals[5],
            tpot_actual_s=totals[6],
            tpot_relative_error=totals[7],
            step_error=step_error,
            transfer_error=transfer_error,
        )

    def explain(self, request_id: RequestId) -> Explanation | None:
        """Return what is known of a request's latest assignment; None when it is not kept."""
        decision = self._decisions.get(request_id)
        return None if decision is None else _explanation(decision)


def _explanation(decision: Decision) -> Explanation:
    ask, choice, names = decision.ask, decision.choice, decision.names
    waited_ns = ask.now_ns - decision.arrived_ns
    predicted = decision.prediction
    return Explanation(
        request_id=decision.request_id,
        policy=decision.policy,
        attempt=decision.attempt,
        num_tokens=ask.num_tokens,
        expected_output_tokens=ask.expected_output_tokens,
        prefill_worker=names[choice.prefill],
        decode_worker=names[choice.decode],
        waited_ms=_ms(waited_ns),
        predicted=Parts(
            queue_ms=_ms(waited_ns + predicted.queue_ns),
            prefill_ms=_ms(predicted.prefill_ns),
            transfer_ms=_ms(predicted.transfer_ns),
            first_decode_ms=_ms(predicted.first_decode_ns),
            ttft_ms=_ms(decision.predicted_ttft_ns),
            tpot_ms=_ms(predicted.tpot_ns),
        ),
        candidates=tuple(
            candidate
            for part, costs in choice.costs.items()
            for candidate in _candidates(decision, part, costs)
        ),
        actual=_actual(decision),
        outcome=decision.outcome,
    )


def _candidates(decision: Decision, part: str, costs: Float64) -> list[Candidate]:
    cached = decision.ask.cached_tokens
    best = np.argsort(costs, kind="stable")[:CANDIDATES_MAX].tolist()
    return [
        Candidate(
            worker_id=decision.names[slot],
            part=part,
            cost_ms=_ms(float(costs[slot])) if costs[slot] < CLOSED else None,
            cached_tokens=0 if cached is None else int(cached[slot]),
            closed="" if costs[slot] < CLOSED else "full, over the budget, or of another role",
        )
        for slot in best
        if decision.names[slot]
    ]


def _actual(decision: Decision) -> Parts | None:
    """Return what the request saw, by its timeline where it has one."""
    if not decision.first_token_ns:
        return None
    ledger: dict[str, float] = {}
    if decision.timeline is not None and decision.timeline.prefill_started_ns:
        ledger = decision.timeline.ledger(decision.first_token_ns)
    transfer = sum(ledger.get(part, 0.0) for part in ("offer", "wait_for_room", "pull"))
    return Parts(
        queue_ms=_ms(ledger.get("queue", 0.0) * NS_PER_S),
        prefill_ms=_ms(ledger.get("prefill", 0.0) * NS_PER_S),
        transfer_ms=_ms(transfer * NS_PER_S),
        first_decode_ms=_ms(ledger.get("first_decode", 0.0) * NS_PER_S),
        ttft_ms=_ms(decision.first_token_ns - decision.arrived_ns),
        tpot_ms=_ms(decision.actual_tpot_ns),
    )


def _ms(ns: float) -> float:
    return round(ns / NS_PER_MS, 4)
