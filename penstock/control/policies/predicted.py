"""Our rule: the least predicted time to first token within the budget for the time per token.

The pair is the best prefill worker and the best decode worker; only the transfer depends on both,
so a few of the best of either side are looked at together. Against the pair stand the workers that
would do both. What that costs others is counted too: a prompt on a worker that decodes makes each
of its sequences wait, which is weighed by the two SLOs, and it takes a decode worker's time, which
is not meant for it. So a hand-off is left out when it costs more than it saves: the prompt is
short, or mostly cached there, or the prefill workers are busy for long. Sequences whose steps are
shorter than their TPOT catch up, so a decode worker is a slow prefill worker, too: what its steps
leave of the TPOT is the part of its time that prompts may have when they wait at the controller.

Source: the regimes of FlowKV, Arrow's loads in SLOs, conditional disaggregation as in Dynamo and
AMPD; the rule is ours.
"""

from math import inf
from typing import Final

import numpy as np

from penstock.control.cost import F
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.policies.policy import FIRST_STEPS, Ask, Choice, breaks_tpot, lacks_room

WAIT_SHARE: Final = 0.25
"""Of the TTFT's SLO: who has waited so long may go wherever there is time for it."""


def predicted(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the pair or the worker with the least predicted TTFT. O(workers), vectorised."""
    compute, wait, begin = fleet.scratch
    now, size, _ = fleet.numbers
    now[()], size[()] = ask.now_ns, ask.num_tokens
    _put_compute(fleet, ask, compute)
    fleet.put_wait(now, wait)
    np.add(wait, compute, begin)
    has_room = fleet.has_room(ask.num_tokens + ask.expected_output_tokens)
    closed = None if has_room else lacks_room(fleet, ask)
    alone = _alone(fleet, ask)
    if ask.tpot_bound_ns < CLOSED:
        step = fleet.step + fleet.rows[F] * ask.num_tokens
        slow = breaks_tpot(fleet, ask, step)
        closed = slow if closed is None else closed + slow
        # Prompts on a worker that decodes stall it; over one answer, by this much a token.
        alone += breaks_tpot(fleet, ask, step + begin / ask.expected_output_tokens)
    if closed is not None:
        alone += closed
    costs = {"alone": alone}
    best = int(alone.argmin())
    choice, cost = (best, best), alone.item(best)
    if fleet.has_pairs and ask.num_tokens > 1:
        costs["prefill"] = first = begin + fleet.prefill_closed
        costs["decode"] = land = _land(fleet, ask)
        if closed is not None:
            land += closed
        pair, pair_cost = _pair(fleet, ask, first, land)
        if pair_cost <= cost:
            choice, cost = pair, pair_cost
        elif pair_cost >= CLOSED and cost > _turn_ns(fleet, ask, closed):
            return None  # a turn at a prefill worker comes before this is worth it
    return Choice(*choice, costs) if cost < CLOSED else None


def _put_compute(fleet: Fleet, ask: Ask, compute: Float64) -> None:
    """Write the time of the prompt itself, `a + b * S + c * (S^2 + 2 * S * P)`, and its tokens S
    that are not there yet.
    """
    fixed, per_token, per_work, *_ = fleet.rows
    size, fresh = fleet.numbers[1], fleet.fresh
    if ask.cached_tokens is None:
        fresh.fill(ask.num_tokens)
        np.multiply(per_work, size, compute)
    else:
        np.add(ask.cached_tokens, size, compute)
        np.subtract(size, ask.cached_tokens, fresh)
        compute *= per_work
    compute += per_token
    compute *= fresh
    compute += fixed


def _turn_ns(fleet: Fleet, ask: Ask, closed: Float64 | None) -> float:
    """Return the TTFT without a transfer of who waits for a turn at a prefill worker."""
    begin = fleet.scratch[2]
    land = FIRST_STEPS * (fleet.step + fleet.rows[F] * ask.num_tokens) + fleet.decode_closed
    if closed is not None:
        land += closed
    return float((begin + fleet.prefill_barred).min() + land.min())


def _alone(fleet: Fleet, ask: Ask) -> Float64:
    """Return what serving a request alone costs, for each slot.

    Beyond its own time there is what others wait for it. Where there are workers for prompts, those
    that decode have to catch up first with the one before; and who has waited for long is in
    nobody's way any more.
    """
    compute, wait, begin = fleet.scratch
    now, _, number = fleet.numbers
    number[()] = ask.slo_ttft_ns / (ask.expected_output_tokens * ask.slo_tpot_ns)
    cost = fleet.seats * number
    cost += fleet.alone_charge
    if ask.waited_ns and fleet.has_pairs:
        number[()] = max(0.0, 1 - ask.waited_ns / (WAIT_SHARE * ask.slo_ttft_ns))
        cost *= number
    cost *= compute
    if fleet.has_pairs and fleet.spare_until_ns > ask.now_ns:
        until = fleet.spare_at - now
        cost += np.maximum(until, wait, out=until)
        cost += compute
    else:
        cost += begin
    cost += fleet.alone_closed
    return cost


def _land(fleet: Fleet, ask: Ask) -> Float64:
    """Return what comes after the prompt is computed, for each slot that could decode: the first
    steps, and the transfers that are on their way and to come.

    A part of the TPOT's SLO is worth the same part of the TTFT's. Which decode worker is best is
    also a matter of how full it is: the estimates of transfers would else keep requests away for
    long from a worker that was crowded once, or send all to one that is new.
    """
    steps = FIRST_STEPS + ask.slo_ttft_ns / ask.slo_tpot_ns
    per_byte = fleet.link_ns_per_byte
    return fleet.weigh_landing(
        steps * ask.num_tokens, steps, per_byte * fleet.token_bytes, per_byte
    )


def _pair(fleet: Fleet, ask: Ask, first: Float64, land: Float64) -> tuple[tuple[int, int], float]:
    """Return the best pair and its TTFT, of which the transfer is per pair."""
    transfers, token_bytes, fresh = fleet.transfers, fleet.token_bytes, fleet.fresh
    per_byte = fleet.link_ns_per_byte
    starts, ends = _finalists(fleet, first, land)
    names, host_of = fleet.names, fleet.host_of
    best, best_cost, best_ns = (0, 0), 4 * CLOSED, 4 * CLOSED
    for decode, decode_ns in ends:
        num_bytes, host = fresh.item(decode) * token_bytes, host_of[decode]
        known = transfers.known_to(names[decode])
        land_ns = decode_ns - per_byte * num_bytes
        for prefill, begin_ns in starts:
            if begin_ns + land_ns >= best_cost:
                break  # whatever the transfer takes, and that goes for those that begin later
            usual = transfers.within if host_of[prefill] == host else transfers.between
            fixed, per_span, each = known.get(names[prefill], usual)
            took_ns = begin_ns + fixed + per_span + each * num_bytes
            if took_ns + land_ns < best_cost:
                best, best_cost, best_ns = (prefill, decode), took_ns + land_ns, took_ns
    if best_cost >= CLOSED:
        return best, best_cost
    return best, best_ns + FIRST_STEPS * fleet.at(best[1]).step_with_ns(ask.num_tokens)


Costs = list[tuple[int, float]]
"""Slots and their costs, least first."""


def _finalists(fleet: Fleet, first: Float64, land: Float64) -> tuple[Costs, Costs]:
    """Return who is looked at in pairs: the best of either side, and the best that are on the host
    of the other side's best, unless what that saves is less than what they lag behind.
    """
    starts, ends = _least(first), _least(land)
    (start, start_ns), (end, end_ns) = starts[0], ends[0]
    is_near = fleet.host_of[start] == fleet.host_of[end]
    if is_near or start_ns >= CLOSED or end_ns >= CLOSED:
        return starts, ends
    far_ns, _, far_per_byte = fleet.transfers.between
    near_ns, _, near_per_byte = fleet.transfers.within
    num_bytes = fleet.fresh.item(end) * fleet.token_bytes
    saved_ns = far_ns - near_ns + (far_per_byte - near_per_byte) * num_bytes
    for best, of, costs in ((starts, end, first), (ends, start, land)):
        if best[1][1] < best[0][1] + saved_ns:
            slots = fleet.hosts[fleet.host_of[of]]
            near = slots.item(costs[slots].argmin())
            if near not in (best[0][0], best[1][0]):
                best.append((near, costs.item(near)))
    return starts, ends


def _least(costs: Float64) -> Costs:
    """Return the two slots of least cost, and their costs, least first."""
    first = int(costs.argmin())
    least = costs.item(first)
    costs[first] = inf
    second = int(costs.argmin())
    found = [(first, least), (second, costs.item(second))]
    costs[first] = least
    return found
