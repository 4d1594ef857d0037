"""Our rule: the least predicted time to first token within the budget for the time per token.

The pair is the best prefill worker and the best decode worker; only the transfer depends on both,
so a few of the best of either side are looked at together. Against the pair stand the workers that
would do both. What that costs others is counted too: a prompt on a worker that decodes makes each
of its sequences wait, which is weighed by the two SLOs, and it takes a decode worker's time, which
is not meant for it. So a hand-off is left out when it costs more than it saves: the prompt is
short, or mostly cached there, or the prefill workers are busy for long.

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
    compute = coefficients[A] + coefficients[B] * fresh
    compute += coefficients[C] * work
    begin = fleet.wait_ns(ask.now_ns)
    begin += compute
    step = fleet.step + coefficients[F] * num_tokens
    no_room = lacks_room(fleet, ask)
    no_room += breaks_tpot(fleet, ask, step)
    alone = _alone(fleet, ask, compute, no_room)
    alone += begin
    if ask.tpot_bound_ns < CLOSED:
        # Prompts on a worker that decodes stall it; over one answer, by this much a token.
        stalled = step + begin / ask.expected_output_tokens
        alone += breaks_tpot(fleet, ask, stalled)
    costs = {"alone": alone}
    best = int(alone.argmin())
    choice, cost = (best, best), float(alone[best])
    if fleet.has_pairs and num_tokens > 1:
        soonest = float((begin + fleet.prefill_barred).min())
        begin += fleet.prefill_closed
        land = step * 1.5
        land += no_room
        land += fleet.decode_closed
        costs |= {"prefill": begin, "decode": land}
        # A part of the TPOT's SLO is worth the same part of the TTFT's.
        slow = step * (ask.slo_ttft_ns / ask.slo_tpot_ns)
        pair, pair_cost = _pair(fleet, begin, land, fresh, slow)
        if pair_cost <= cost:
            choice, cost = pair, pair_cost
        elif pair_cost >= CLOSED and cost > soonest + float(land.min()):
            return None  # a turn at a prefill worker comes before this is worth it
    return Choice(*choice, costs) if cost < CLOSED else None


def _alone(fleet: Fleet, ask: Ask, compute: Float64, no_room: Float64) -> Float64:
    """Return what serving a request alone costs beyond its own prefill, for each slot."""
    output_ns = ask.expected_output_tokens * ask.slo_tpot_ns
    charge = fleet.seats * (ask.slo_ttft_ns / output_ns)
    charge += fleet.alone_charge
    charge *= compute
    charge += no_room
    charge += fleet.alone_closed
    return charge


def _pair(
    fleet: Fleet, begin: Float64, land: Float64, fresh: Float64 | float, slow: Float64
) -> tuple[tuple[int, int], float]:
    """Return the best pair and its cost: TTFT, of which the transfer is per pair.

    Which decode worker is best is also a matter of how full it is: by `slow` and what is on its way
    there. The estimates of transfers would else keep requests away for long from a worker that was
    crowded once, or send all to one that is new.
    """
    transfers = fleet.transfers
    fixed, per_span, per_byte = transfers.others
    num_bytes = np.multiply(fresh, fleet.token_bytes)
    # Where nothing is cached the bytes are the same for all.
    fullness = slow + fleet.arriving * per_byte
    land = land + fullness
    land_all = land + (fixed + per_span + per_byte * num_bytes)
    if not transfers.num_known:
        prefill, decode = int(begin.argmin()), int(land_all.argmin())
        return (prefill, decode), float(begin[prefill] + land_all[decode] - fullness[decode])
    names = fleet.names
    best, best_cost = (0, 0), 4 * CLOSED
    first = [(slot, float(begin[slot])) for slot in _least(begin)]
    for decode in _least(land_all):
        base = float(land[decode])
        size = float(num_bytes[decode]) if num_bytes.ndim else float(num_bytes)
        for prefill, begin_ns in first:
            took_ns = transfers.predict_ns(names[prefill], names[decode], size, 1)
            cost = begin_ns + base + took_ns
            if cost < best_cost:
                best, best_cost = (prefill, decode), cost
    return best, best_cost - float(fullness[best[1]])


def _least(costs: Float64) -> list[int]:
    if len(costs) <= FINALISTS:
        return list(range(len(costs)))
    best: list[int] = np.argpartition(costs, FINALISTS)[:FINALISTS].tolist()
    return best
