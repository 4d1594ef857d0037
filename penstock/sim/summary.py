"""`Summary`: the figures of a simulated run, from what was seen of it.

All are plain numbers, so that a script can read them as JSON. A request is good when its first
token came within the TTFT limit and its mean gap between tokens within the TPOT limit; goodput is
good requests per second of the time in which requests arrived.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct

from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.observe import Observation, Served

PARTS = ("queue", "prefill", "offer", "wait_for_room", "pull", "first_decode", "residual")


class Slo(Struct, frozen=True, kw_only=True):
    """What a client is promised, in milliseconds."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 50.0

    def is_met(self, served: Served) -> bool:
        """True when the request was answered in time."""
        return (
            served.error is None
            and served.finished_ns > 0
            and served.ttft_s * 1000 <= self.ttft_ms
            and served.tpot_s * 1000 <= self.tpot_ms
        )


class Spread(Struct, frozen=True):
    """Mean and percentiles of one figure, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Summary(Struct, frozen=True, kw_only=True):
    """The figures of one run. Shares are between 0 and 1.

    `duration_s` is until the last answer, `arrivals_s` until the last arrival. `ttft_parts` is
    where the mean time to first token went, in milliseconds. `transfer_share` is offer, wait for
    room and pull beside TTFT; `pull_share_of_e2e` the pull alone beside the whole request.
    """

    requests: int
    finished: int
    failed: int
    unfinished: int
    duration_s: float
    arrivals_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    slo_attainment: float
    ttft_met: float
    tpot_met: float
    ttft_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    ttft_parts: dict[str, float]
    transfer_share: float
    pull_share_of_e2e: float
    utilisation: dict[str, float]
    utilisation_by_worker: dict[str, float]
    flips: int
    workers_mean: float
    workers_started: int
    workers_retired: int
    prefix_hit_share: float
    preemptions: int
    gigabytes_moved: float
    steps: int
    messages: int
    events: int


def summarise(seen: Observation, slo: Slo) -> Summary:
    """Return the figures of a run under `slo`."""
    done = [s for s in seen.served if s.error is None and s.finished_ns]
    duration_s = max(seen.ended_ns, 1) / NS_PER_S
    arrivals_s = max((s.arrived_ns for s in seen.served), default=0) / NS_PER_S
    num_good = sum(map(slo.is_met, done))
    parts = mean_parts(done)
    in_transfer = sum(parts[name] for name in ("offer", "wait_for_room", "pull"))
    e2e_ms = _mean([s.e2e_s * 1000 for s in done])
    total = max(len(seen.served), 1)
    return Summary(
        requests=len(seen.served),
        finished=len(done),
        failed=sum(s.error is not None for s in seen.served),
        unfinished=seen.unfinished,
        duration_s=duration_s,
        arrivals_s=arrivals_s,
        requests_per_s=len(done) / duration_s,
        input_tokens_per_s=sum(s.input_tokens for s in done) / duration_s,
        output_tokens_per_s=sum(s.num_tokens for s in done) / duration_s,
        goodput_per_s=num_good / max(arrivals_s, 1e-9),
        slo_attainment=num_good / total,
        ttft_met=sum(s.ttft_s * 1000 <= slo.ttft_ms for s in done) / total,
        tpot_met=sum(s.tpot_s * 1000 <= slo.tpot_ms for s in done) / total,
        ttft_ms=spread([s.ttft_s * 1000 for s in done]),
        tpot_ms=spread([s.tpot_s * 1000 for s in done if s.num_tokens > 1]),
        e2e_ms=spread([s.e2e_s * 1000 for s in done]),
        ttft_parts=parts,
        transfer_share=in_transfer / max(sum(parts.values()), 1e-9),
        pull_share_of_e2e=parts["pull"] / max(e2e_ms, 1e-9),
        utilisation=_utilisation_by_role(seen),
        utilisation_by_worker=_utilisation(seen),
        flips=seen.flips,
        workers_mean=_mean([len(sample.roles) for sample in seen.samples]),
        workers_started=seen.started,
        workers_retired=seen.retired,
        prefix_hit_share=seen.prefix_hits / max(seen.prefix_queries, 1),
        preemptions=seen.preemptions,
        gigabytes_moved=seen.bytes_moved / 1e9,
        steps=seen.num_steps,
        messages=seen.num_messages,
        events=seen.num_events,
    )


def spread(values: Sequence[float]) -> Spread:
    """Return mean and percentiles; zeros of nothing."""
    if not values:
        return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99, most = np.percentile(np.array(values), [50, 90, 99, 100]).tolist()
    return Spread(float(np.mean(values)), p50, p90, p99, most)


def mean_parts(served: Iterable[Served]) -> dict[str, float]:
    """Return where the mean time to first token went, in ms; the parts add up to it."""
    sums = dict.fromkeys(PARTS, 0.0)
    count = 0
    for one in served:
        if one.timeline is None:
            continue
        count += 1
        for name, seconds in one.timeline.ledger(one.first_token_ns).items():
            if name in sums:
                sums[name] += seconds
    return {name: 1000 * total / max(count, 1) for name, total in sums.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _utilisation(seen: Observation) -> dict[str, float]:
    if not seen.samples:
        return {}
    last = seen.samples[-1]
    elapsed_ns = max(last.at_ns, NS_PER_MS)
    return {name: worker.busy_ns / elapsed_ns for name, worker in last.workers.items()}


def _utilisation_by_role(seen: Observation) -> dict[str, float]:
    """Return the busy share of worker time, by the role that the worker had then."""
    busy: dict[str, float] = {}
    total: dict[str, float] = {}
    for before, after in pairwise(seen.samples):
        for name, role in before.roles.items():
            if name not in before.workers or name not in after.workers:
                continue
            spent = after.workers[name].busy_ns - before.workers[name].busy_ns
            busy[role] = busy.get(role, 0.0) + spent
            total[role] = total.get(role, 0.0) + after.at_ns - before.at_ns
    return {role: busy[role] / max(total[role], 1.0) for role in sorted(busy)}
