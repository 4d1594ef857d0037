"""Arrow's rule: requests go by two numbers, compared one after the other.

For a prefill: tokens that a worker decodes, then the predicted time of all its prefills with this
one; feasible if that is within the TTFT's SLO. For a decode: tokens of prefills that a worker has
on its books, then the tokens that it decodes beyond what the TPOT's SLO allows. Prefills and
decodes disturb each other, so a worker with none of the other kind comes first; an infeasible one
comes last.

Source: Arrow (arXiv 2505.11916), as implemented by Narwhal.
"""

import numpy as np

from penstock.control.cost import A, B, C, D, E, F
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.policies.policy import Ask, Choice, lacks_room

_FIRST = 1e6
"""Weighs the first number of a pair above the second, which is at most some 1e5."""
_INFEASIBLE = 1e15


def arrow(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the pair of least lexicographic cost, or one worker where there are no pairs."""
    prefill = _prefill_cost(fleet, ask) + fleet.prefill_closed
    no_room = lacks_room(fleet, ask)
    decode = _decode_cost(fleet, ask) + (fleet.decode_closed + no_room)
    alone = prefill - fleet.prefill_closed + (fleet.alone_closed + no_room)
    first, second, one = int(prefill.argmin()), int(decode.argmin()), int(alone.argmin())
    costs = {"prefill": prefill, "decode": decode, "alone": alone}
    is_pair = fleet.has_pairs and ask.num_tokens > 1
    if is_pair and max(prefill[first], decode[second]) < CLOSED:
        return Choice(first, second, costs)
    alone += fleet.alone_charge * (CLOSED if is_pair else 0.0)
    one = int(alone.argmin())
    return Choice(one, one, costs) if alone[one] < CLOSED else None


def _prefill_cost(fleet: Fleet, ask: Ask) -> Float64:
    coefficients, num_tokens = fleet.coefficients, ask.num_tokens
    own = coefficients[A] + coefficients[B] * num_tokens + coefficients[C] * num_tokens**2
    total_ns = fleet.wait_ns(ask.now_ns) + own
    cost: Float64 = fleet.decode_tokens * _FIRST + total_ns / 1e6
    cost += np.multiply(total_ns > ask.slo_ttft_ns, _INFEASIBLE)
    return cost


def _decode_cost(fleet: Fleet, ask: Ask) -> Float64:
    """The tokens that a worker may decode within the SLO follow from its own step times."""
    coefficients = fleet.coefficients
    for_context_ns = ask.slo_tpot_ns - coefficients[D] - coefficients[E] * (fleet.seats + 1)
    most_tokens = for_context_ns / coefficients[F]
    over = fleet.decode_tokens + ask.num_tokens - most_tokens
    cost: Float64 = fleet.prefill_tokens * _FIRST + fleet.decode_tokens / 1e3
    cost += np.multiply(over > 0, _INFEASIBLE)
    return cost
