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

from penstock.control.cost import A, B, C, F
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.policies.policy import Ask, Choice, breaks_tpot, lacks_room

FINALISTS: Final = 3
"""Of either side, looked at in pairs."""
WAIT_SHARE: Final = 0.25
"""Of the TTFT's SLO: who has waited so long may go wherever there is time for it."""
FIRST_STEPS: Final = 1.5
"""A step is under way when the KV arrives, and half of it is still to come."""


def predicted(fleet: Fleet, ask: Ask) -> Choice | None:
    """Return the pair or the worker with the least predicted TTFT. O(workers), vectorised."""
    coefficients = fleet.coefficients
    num_tokens, cached = ask.num_tokens, ask.cached_tokens
    fresh: Float64 | float = float(num_tokens)
    work: Float64 | float = fresh * fresh
    if cached is not None:
        hits: Float64 = np.minimum(cached, num_tokens - 1.0)
        fresh = num_tokens - hits
        work = work - hits * hits
    compute = coefficients[B] * fresh
    compute += coefficients[A]
    compute += coefficients[C] * work
    begin = fleet.wait_ns(ask.now_ns)
    begin += compute
    step = coefficients[F] * num_tokens
    step += fleet.step
    no_room = lacks_room(fleet, ask)
    is_bound = ask.tpot_bound_ns < CLOSED
    if is_bound:
        no_room += breaks_tpot(fleet, ask, step)
    alone = _alone(fleet, ask, compute, begin)
    alone += begin
    alone += no_room
    if is_bound:
        # Prompts on a worker that decodes stall it; over one answer, by this much a token.
        stalled = step + begin / ask.expected_output_tokens
        alone += breaks_tpot(fleet, ask, stalled)
    costs = {"alone": alone}
    best = int(alone.argmin())
    choice, cost = (best, best), alone.item(best)
    if fleet.has_pairs and num_tokens > 1:
        no_room += fleet.decode_closed
        first = begin + fleet.prefill_closed
        # A part of the TPOT's SLO is worth the same part of the TTFT's. Which decode worker is best
        # is also a matter of how full it is: the estimates of transfers would else keep requests
        # away for long from a worker that was crowded once, or send all to one that is new.
        land = step * (FIRST_STEPS + ask.slo_ttft_ns / ask.slo_tpot_ns)
        land += no_room
        costs |= {"prefill": first, "decode": land}
        pair, pair_cost = _pair(fleet, first, land, fresh, step)
        if pair_cost <= cost:
            choice, cost = pair, pair_cost
        elif pair_cost >= CLOSED and cost > _turn_ns(fleet, begin, step, no_room):
            return None  # a turn at a prefill worker comes before this is worth it
    return Choice(*choice, costs) if cost < CLOSED else None


def _turn_ns(fleet: Fleet, begin: Float64, step: Float64, closed: Float64) -> float:
    """Return the TTFT without a transfer of who waits for a turn at a prefill worker."""
    soonest = float((begin + fleet.prefill_barred).min())
    return soonest + float((step * FIRST_STEPS + closed).min())


def _alone(fleet: Fleet, ask: Ask, compute: Float64, begin: Float64) -> Float64:
    """Return what serving a request alone costs beyond its own prefill, for each slot.

    Where there are workers for prompts, those that decode have to catch up first with the one
    before; and who has waited for long is in nobody's way any more.
    """
    output_ns = ask.expected_output_tokens * ask.slo_tpot_ns
    charge = fleet.seats * (ask.slo_ttft_ns / output_ns)
    charge += fleet.alone_charge
    if fleet.has_pairs:
        charge *= max(0.0, 1 - ask.waited_ns / (WAIT_SHARE * ask.slo_ttft_ns))
        charge *= compute
        behind = fleet.spare_at - ask.now_ns
        behind += compute
        behind -= begin
        charge += np.maximum(behind, 0.0, out=behind)
    else:
        charge *= compute
    charge += fleet.alone_closed
    return charge


def _pair(
    fleet: Fleet, first: Float64, land: Float64, fresh: Float64 | float, step: Float64
) -> tuple[tuple[int, int], float]:
    """Return the best pair and its TTFT, of which the transfer is per pair. Changes `land`: to what
    is on its way to a worker, and what is to come.
    """
    transfers, token_bytes = fleet.transfers, fleet.token_bytes
    _, _, per_byte = transfers.others
    land += fleet.arriving * per_byte
    land += fresh * (per_byte * token_bytes)
    if transfers.num_known:
        prefills, decodes = _least(first), _least(land)
    else:
        prefills, decodes = [int(first.argmin())], [int(land.argmin())]
    coefficients, names = transfers.coefficients, fleet.names
    starts = [(slot, names[slot], first.item(slot)) for slot in prefills]
    best, best_cost, best_ns = (0, 0), 4 * CLOSED, 4 * CLOSED
    for decode in decodes:
        missing = fresh if isinstance(fresh, float) else fresh.item(decode)
        num_bytes, name = missing * token_bytes, names[decode]
        land_ns = land.item(decode) - per_byte * num_bytes
        for prefill, source, begin_ns in starts:
            fixed, per_span, each = coefficients(source, name)
            took_ns = begin_ns + fixed + per_span + each * num_bytes
            if took_ns + land_ns < best_cost:
                best, best_cost, best_ns = (prefill, decode), took_ns + land_ns, took_ns
    if best_cost >= CLOSED:
        return best, best_cost
    return best, best_ns + FIRST_STEPS * step.item(best[1])


def _least(costs: Float64) -> list[int]:
    if len(costs) <= FINALISTS:
        return list(range(len(costs)))
    best: list[int] = costs.argpartition(FINALISTS)[:FINALISTS].tolist()
    return best
