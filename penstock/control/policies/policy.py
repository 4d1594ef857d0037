"""What a policy is asked and what it answers, and the prediction that every answer comes with."""

from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec import Struct

from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet

FIRST_STEPS: Final = 1.5
"""A step is under way when the KV arrives, and half of it is still to come."""


class Ask(Struct, frozen=True, gc=False):
    """A request that wants workers.

    `num_tokens` are prompt and output so far. `cached_tokens` are how many of them each slot has,
    [num_slots], None where nobody looked. `draw` is 64 bits that depend on the request alone,
    `turn` counts the requests that were placed, `waited_ns` is since this one came. SLOs in ns;
    `tpot_bound_ns` is `CLOSED` where there is none to keep.
    """

    num_tokens: int
    expected_output_tokens: int
    cached_tokens: Float64 | None
    draw: int
    turn: int
    now_ns: int
    slo_ttft_ns: float
    slo_tpot_ns: float
    tpot_bound_ns: float
    waited_ns: float = 0.0


class Choice(Struct, frozen=True, gc=False):
    """The slots of the workers chosen, equal when one does both.

    `costs` are what was compared, per part and slot in ns, for the explanation.
    """

    prefill: int
    decode: int
    costs: dict[str, Float64]


Policy = Callable[[Fleet, Ask], Choice | None]
"""Chooses; None when nobody who could do it is open. Changes nothing."""


class Prediction(Struct, frozen=True, gc=False):
    """The expected parts of one request's time to first token, and of each token after it, in
    ns.
    """

    queue_ns: float
    prefill_ns: float
    transfer_ns: float
    first_decode_ns: float
    tpot_ns: float

    @property
    def ttft_ns(self) -> float:
        """The sum of the parts."""
        return self.queue_ns + self.prefill_ns + self.transfer_ns + self.first_decode_ns


def predict(fleet: Fleet, ask: Ask, prefill: int, decode: int) -> Prediction:
    """Predict what a request would see on these two slots, whoever chose them."""
    is_alone = prefill == decode
    at, onto = fleet.at(prefill), fleet.at(decode)
    num_tokens = ask.num_tokens - (not is_alone)
    cached = cached_on_decode = 0.0
    if ask.cached_tokens is not None:
        cached = ask.cached_tokens.item(prefill)
        cached_on_decode = ask.cached_tokens.item(decode)
    fixed, per_token, per_work = at.prefill_coefficients
    compute_ns = fixed + per_token * (num_tokens - cached) + per_work * (num_tokens**2 - cached**2)
    step_ns = onto.step_with_ns(ask.num_tokens)
    transfer_ns = first_decode_ns = 0.0
    if not is_alone:
        num_bytes = (num_tokens - cached_on_decode) * fleet.token_bytes
        source, to = fleet.names[prefill], fleet.names[decode]
        transfer_ns = fleet.transfers.predict_ns(source, to, num_bytes, 1)
        first_decode_ns = step_ns * FIRST_STEPS if onto.num_decodes else step_ns
    queue_ns = max(at.free_at_ns - ask.now_ns, at.backlog_ns / 2)
    prefill_ns = compute_ns if num_tokens else 0.0
    return Prediction(queue_ns, prefill_ns, transfer_ns, first_decode_ns, step_ns)


def breaks_tpot(fleet: Fleet, ask: Ask, step_ns: Float64) -> Float64:
    """Return `CLOSED` for the slots whose decode steps of `step_ns` would break the budget, 0 for
    the others. A worker without a sequence is within any budget: no other could do better.
    """
    return np.multiply((step_ns > ask.tpot_bound_ns) & (fleet.seats > 0), CLOSED)


def lacks_room(fleet: Fleet, ask: Ask) -> Float64:
    """Return `CLOSED` for the slots whose pool has no room for the request and its expected output,
    0 for the others, [num_slots].
    """
    return np.multiply(fleet.kv_free < ask.num_tokens + ask.expected_output_tokens, CLOSED)
