"""The rules that other routers use, over the same books.

A request goes to a pair where there are prefill and decode workers, each chosen by the rule. Mixed
workers are one more way: they are taken when the rule likes them better than the pair's prefill
worker.
"""

from typing import Final

import numpy as np

from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.policies.policy import Ask, Choice, lacks_room

IMBALANCE: Final = 1.5
"""How many times the least load a worker may have and still be taken for its cache."""
SLACK_TOKENS: Final = 4096


def least_loaded(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the workers with the least work assigned, in tokens; ties go to who joined first."""
    alone = fleet.prefill_tokens + fleet.decode_tokens
    return _best(fleet, ask, fleet.prefill_tokens, fleet.decode_tokens, alone)


def round_robin(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return each worker of a role in its turn."""
    slots = np.arange(len(fleet.names), dtype=np.float64)
    return _best(
        fleet,
        ask,
        _turns(slots, fleet.prefill_closed, ask.turn),
        _turns(slots, fleet.decode_closed, ask.turn),
        _turns(slots, fleet.alone_closed, ask.turn),
    )


def power_of_two(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the less loaded of two workers drawn, for either part.

    Source: Mitzenmacher, The power of two choices in randomized load balancing.
    """
    prefill, decode = fleet.prefill_tokens, fleet.decode_tokens
    return _best(
        fleet,
        ask,
        prefill + _undrawn(fleet.prefill_closed, ask.draw),
        decode + _undrawn(fleet.decode_closed, ask.draw >> 16),
        prefill + decode + _undrawn(fleet.alone_closed, ask.draw >> 32),
    )


def prefix_aware(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the workers with the longest cached prefix, unless they are far busier than the least.

    Source: the cache-aware policy of SGLang's gateway.
    """
    cached: Float64 = np.zeros(len(fleet.names))
    if ask.cached_tokens is not None:
        cached += ask.cached_tokens
    prefill, decode = fleet.prefill_tokens, fleet.decode_tokens
    return _best(
        fleet,
        ask,
        _by_prefix(prefill, fleet.prefill_closed, cached),
        _by_prefix(decode, fleet.decode_closed, cached),
        _by_prefix(prefill + decode, fleet.alone_closed, cached),
    )


def _best(
    fleet: Fleet, ask: Ask, prefill: Float64, decode: Float64, alone: Float64
) -> Choice | None:
    """Return the open workers of least cost."""
    no_room = lacks_room(fleet, ask)
    meant = fleet.alone_charge * (CLOSED if ask.num_tokens > 1 else 0.0)
    alone = alone + (fleet.alone_closed + no_room + meant)
    prefill = prefill + fleet.prefill_closed
    decode = decode + (fleet.decode_closed + no_room)
    costs = {"prefill": prefill, "decode": decode, "alone": alone}
    one, first, second = int(alone.argmin()), int(prefill.argmin()), int(decode.argmin())
    if fleet.has_pairs and ask.num_tokens > 1 and max(prefill[first], decode[second]) < CLOSED:
        if alone[one] < prefill[first]:
            return Choice(one, one, costs)
        return Choice(first, second, costs)
    return Choice(one, one, costs) if alone[one] < CLOSED else None


def _turns(slots: Float64, closed: Float64, turn: int) -> Float64:
    """Return a cost that is least for the open slot whose turn it is."""
    open_slots = np.flatnonzero(closed < CLOSED)
    cost = slots.copy()
    if len(open_slots):
        cost[open_slots[turn % len(open_slots)]] = -1.0
    return cost


def _undrawn(closed: Float64, draw: int) -> Float64:
    """Return a cost that leaves two of the open slots, by a draw."""
    open_slots = np.flatnonzero(closed < CLOSED)
    count = len(open_slots)
    cost = np.full(len(closed), CLOSED)
    if count:
        first = draw % count
        second = (first + 1 + (draw >> 8) % max(count - 1, 1)) % count
        cost[open_slots[[first, second]]] = 0.0
    return cost


def _by_prefix(load: Float64, closed: Float64, cached: Float64) -> Float64:
    """Return a cost by what is missing of the prompt, then by load; of load alone when too busy."""
    least = float((load + closed).min(initial=CLOSED))
    is_busy = load > IMBALANCE * least + SLACK_TOKENS
    span = float(load.max(initial=0.0)) + 1.0
    return np.where(is_busy, CLOSED / 4 + load, load / span - cached)
