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

from typing import Final

import numpy as np

from penstock.control.cost import F
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.policies.policy import Ask, Choice, breaks_tpot, has_room, lacks_room

FINALISTS: Final = 3
"""Of either side, looked at in pairs."""
WAIT_SHARE: Final = 0.25
"""Of the TTFT's SLO: who has waited so long may go wherever there is time for it."""
FIRST_STEPS: Final = 1.5
"""A step is under way when the KV arrives, and half of it is still to come."""


def predicted(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the pair or the worker with the least predicted TTFT. O(workers), vectorised."""
    compute, wait, step, fresh, begin = fleet.scratch.rows
    number, now, size = fleet.scratch.numbers
    now[()], size[()] = ask.now_ns, ask.num_tokens
    _put_compute(fleet, ask, compute, fresh)
    fleet.put_wait(now, wait)
    np.add(wait, compute, begin)
    np.multiply(fleet.rows[F], size, step)
    step += fleet.step
    closed = None if has_room(fleet, ask) else lacks_room(fleet, ask)
    is_bound = ask.tpot_bound_ns < CLOSED
    if is_bound:
        slow = breaks_tpot(fleet, ask, step)
        closed = slow if closed is None else closed + slow
    alone = _alone(fleet, ask)
    if closed is not None:
        alone += closed
    if is_bound:
        # Prompts on a worker that decodes stall it; over one answer, by this much a token.
        stalled = step + begin / ask.expected_output_tokens
        alone += breaks_tpot(fleet, ask, stalled)
    costs = {"alone": alone}
    best = int(alone.argmin())
    choice, cost = (best, best), alone.item(best)
    if fleet.has_pairs and ask.num_tokens > 1:
        first = begin + fleet.prefill_closed
        # A part of the TPOT's SLO is worth the same part of the TTFT's. Which decode worker is best
        # is also a matter of how full it is: the estimates of transfers would else keep requests
        # away for long from a worker that was crowded once, or send all to one that is new.
        number[()] = FIRST_STEPS + ask.slo_ttft_ns / ask.slo_tpot_ns
        land = step * number
        land += fleet.decode_closed
        if closed is not None:
            land += closed
        costs["prefill"], costs["decode"] = first, land
        pair, pair_cost = _pair(fleet, first, land)
        if pair_cost <= cost:
            choice, cost = pair, pair_cost
        elif pair_cost >= CLOSED and cost > _turn_ns(fleet, closed):
            return None  # a turn at a prefill worker comes before this is worth it
    return Choice(*choice, costs) if cost < CLOSED else None


def _put_compute(fleet: Fleet, ask: Ask, compute: Float64, fresh: Float64) -> None:
    """Write the time of the prompt itself, `a + b * S + c * (S^2 + 2 * S * P)`, and its tokens S
    that are not there yet.
    """
    fixed, per_token, per_work, *_ = fleet.rows
    number, _, size = fleet.scratch.numbers
    if ask.cached_tokens is None:
        fresh.fill(ask.num_tokens)
        np.multiply(per_work, size, compute)
    else:
        number[()] = ask.num_tokens - 1
        np.minimum(ask.cached_tokens, number, out=fresh)
        np.add(fresh, size, compute)
        np.subtract(size, fresh, fresh)
        compute *= per_work
    compute += per_token
    compute *= fresh
    compute += fixed


def _turn_ns(fleet: Fleet, closed: Float64 | None) -> float:
    """Return the TTFT without a transfer of who waits for a turn at a prefill worker."""
    _, _, step, _, begin = fleet.scratch.rows
    land = step * FIRST_STEPS + fleet.decode_closed
    if closed is not None:
        land += closed
    return float((begin + fleet.prefill_barred).min() + land.min())


def _alone(fleet: Fleet, ask: Ask) -> Float64:
    """Return what serving a request alone costs, for each slot.

    Beyond its own time there is what others wait for it. Where there are workers for prompts, those
    that decode have to catch up first with the one before; and who has waited for long is in
    nobody's way any more.
    """
    compute, wait, _, _, begin = fleet.scratch.rows
    number, now, _ = fleet.scratch.numbers
    share = 1.0
    if fleet.has_pairs:
        share = max(0.0, 1 - ask.waited_ns / (WAIT_SHARE * ask.slo_ttft_ns))
    number[()] = ask.slo_ttft_ns / (ask.expected_output_tokens * ask.slo_tpot_ns)
    cost = fleet.seats * number
    cost += fleet.alone_charge
    if share < 1:
        cost *= share
    cost *= compute
    cost += begin
    if fleet.has_pairs and fleet.spare_until_ns > ask.now_ns:
        behind = fleet.spare_at - now
        behind -= wait
        cost += np.maximum(behind, 0.0, out=behind)
    cost += fleet.alone_closed
    return cost


def _pair(fleet: Fleet, first: Float64, land: Float64) -> tuple[tuple[int, int], float]:
    """Return the best pair and its TTFT, of which the transfer is per pair. Changes `land`: to what
    is on its way to a worker, and what is to come.
    """
    transfers, token_bytes = fleet.transfers, fleet.token_bytes
    coming, _, step, fresh, _ = fleet.scratch.rows
    number, _, _ = fleet.scratch.numbers
    _, _, per_byte = transfers.others
    number[()] = per_byte
    land += np.multiply(fleet.arriving, number, coming)
    number[()] = per_byte * token_bytes
    land += np.multiply(fresh, number, coming)
    finalists = FINALISTS if transfers.num_known else 1
    starts, names = _least(first, finalists), fleet.names
    best, best_cost, best_ns = (0, 0), 4 * CLOSED, 4 * CLOSED
    for decode, decode_ns in _least(land, finalists):
        num_bytes, name = fresh.item(decode) * token_bytes, names[decode]
        land_ns = decode_ns - per_byte * num_bytes
        for prefill, begin_ns in starts:
            if begin_ns + land_ns >= best_cost:
                break  # whatever the transfer takes, and that goes for those that begin later
            fixed, per_span, each = transfers.coefficients(names[prefill], name)
            took_ns = begin_ns + fixed + per_span + each * num_bytes
            if took_ns + land_ns < best_cost:
                best, best_cost, best_ns = (prefill, decode), took_ns + land_ns, took_ns
    if best_cost >= CLOSED:
        return best, best_cost
    return best, best_ns + FIRST_STEPS * step.item(best[1])


def _least(costs: Float64, count: int) -> list[tuple[int, float]]:
    """Return the slots of least cost, and their costs, least first."""
    least: list[tuple[int, float]] = []
    for _ in range(min(count, len(costs))):
        slot = int(costs.argmin())
        least.append((slot, costs.item(slot)))
        costs[slot] = np.inf
    for slot, cost in least:
        costs[slot] = cost
    return least
