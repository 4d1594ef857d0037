"""`Calibration`: a cluster as one of its runs has shown it, for the simulator to run again.

Step times are fitted to every step that the workers took, as their cores saw them
(`penstock/sim/worker_log.py`), and bent to what decode steps of each number of sequences usually
took; what a step took beside that is kept as a ratio and drawn from, and so are the times of
messages. Nothing else is added: no factor makes a simulation fit. The router's own prediction
(`penstock/control/cost.py`) stays a line: it is to choose between workers after a few steps, and
a table would have to be seen in full first.

Called by `bench/sim_vs_real.py`. `penstock/sim/recording.py` does with less where there is only
the controller's log.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS, NS_PER_S, WorkerId
from penstock.sim.fabric import FabricCost, MessageTimes
from penstock.sim.fleet import Member
from penstock.sim.profile import Hardware, Kind, Spread, StepTimes, size_of
from penstock.sim.recording import fit
from penstock.sim.worker_log import Taken, TakenStep

STEPS_MIN: Final = 32
SEEN_MIN: Final = 16
"""A kind of step seen less often borrows the ratios of kinds like it."""
PULLS_MIN: Final = 8
NS_PER_BYTE_MIN: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Calibration:
    """The workers with their step times, and what connects them."""

    members: tuple[Member, ...]
    fabric: FabricCost


def calibrate(
    taken: Taken, workers: Iterable[WorkerInfo], front_ns: Sequence[int] = ()
) -> Calibration:
    """Return workers and links as they were when this was taken.

    `front_ns` is how long it took a token from the controller to its client; without any, what is
    simulated is what the controller sees.

    Raises: `BadRequest` when there are too few steps to go by.
    """
    members = [
        Member(str(info.worker_id), info.role, _hardware(taken, info), host=0) for info in workers
    ]
    messages = MessageTimes({kind: tuple(seen) for kind, seen in taken.messages_ns.items()})
    return Calibration(tuple(members), _fabric(taken, messages, tuple(front_ns)))


def fit_times(steps: Sequence[TakenStep]) -> tuple[StepTimes, Spread]:
    """Return the coefficients that fit these steps best, and how far each lay from them.

    Raises: `BadRequest` when there are too few.
    """
    if len(steps) < STEPS_MIN:
        raise BadRequest(
            f"the logs have {len(steps)} steps of a worker to learn from; it takes {STEPS_MIN}: "
            "record a longer run"
        )
    rows = np.array([_row(step) for step in steps])
    durations = np.array([float(step.duration_ns) for step in steps])
    coefficients = fit(rows, durations)
    fitted = np.maximum(rows @ np.array(coefficients), 1.0)
    times = StepTimes(*(value / NS_PER_MS for value in coefficients))
    bends = _bends(steps, (durations / fitted).tolist())
    line = Spread({}, bends)
    usual = [
        time_ns * (1.0 if step.prefill_tokens else line.bend(step.decodes))
        for step, time_ns in zip(steps, fitted.tolist(), strict=True)
    ]
    return times, Spread(_ratios(steps, usual), bends)


def _hardware(taken: Taken, info: WorkerInfo) -> Hardware:
    """What a worker did too seldom to tell, prompts or decodes, is taken from all of them."""
    own = taken.steps.get(WorkerId(info.worker_id), [])
    everybody = [step for steps in taken.steps.values() for step in steps]
    steps = []
    for has_prefill in (True, False):
        mine = [step for step in own if (step.prefill_tokens > 0) == has_prefill]
        all_ = [step for step in everybody if (step.prefill_tokens > 0) == has_prefill]
        steps += mine if len(mine) >= STEPS_MIN else all_
    times, spread = fit_times(steps)
    return Hardware(
        "recorded", info.layout.model, 1, info.capacity_tokens, times, info.num_blocks, spread
    )


def _row(step: TakenStep) -> tuple[float, ...]:
    """Return what a step had of each coefficient, as `StepTimes.duration_ns` adds them up."""
    has_decodes = step.decodes > 0
    return (
        float(not has_decodes),
        step.prefill_tokens,
        step.prefill_work,
        float(has_decodes),
        step.decodes,
        step.context_tokens,
    )


def _bends(steps: Sequence[TakenStep], ratios: Sequence[float]) -> dict[int, float]:
    """Return the median ratio of decode steps without newcomers, by their number of sequences; of
    numbers seen seldom there is none.
    """
    seen: dict[int, list[float]] = {}
    for step, ratio in zip(steps, ratios, strict=True):
        if not (step.prefill_tokens or step.has_newcomer):
            seen.setdefault(step.decodes, []).append(ratio)
    return {
        batch: statistics.median(seen[batch])
        for batch in sorted(seen)
        if len(seen[batch]) >= SEEN_MIN
    }


def _ratios(steps: Sequence[TakenStep], usual_ns: Sequence[float]) -> dict[Kind, tuple[float, ...]]:
    """Return how far each step lay from its time, by kind.

    A kind with few steps has those of its size beside them, crowded or not; a size that is rare in
    both has none, and the nearest stands for it.
    """
    seen: dict[Kind, list[float]] = {}
    either: dict[Kind, list[float]] = {}
    for step, time_ns in zip(steps, usual_ns, strict=True):
        ratio, has_prefill = step.duration_ns / time_ns, step.prefill_tokens > 0
        kind = Kind(has_prefill, step.has_newcomer, step.is_crowded, size_of(time_ns))
        seen.setdefault(kind, []).append(ratio)
        either.setdefault(kind._replace(is_crowded=False), []).append(ratio)
    ratios: dict[Kind, tuple[float, ...]] = {}
    for kind, both in either.items():
        largest = max(len(others) for other, others in either.items() if other[:2] == kind[:2])
        if len(both) < min(SEEN_MIN, largest):
            continue
        for is_crowded in (False, True):
            own_kind = kind._replace(is_crowded=is_crowded)
            own = seen.get(own_kind, [])
            ratios[own_kind] = tuple(own if len(own) >= SEEN_MIN else both)
    return ratios


def _fabric(taken: Taken, messages: MessageTimes, front_ns: tuple[int, ...]) -> FabricCost:
    """Return links as fast as the pulls were; the usual ones where there were hardly any."""
    # Pulls that shared a link do so in the simulation as well: those alone tell its speed.
    pulls = [pull for pull in taken.pulls if not pull.is_shared]
    if len(pulls) < PULLS_MIN:
        pulls = taken.pulls
    if len(pulls) < PULLS_MIN:
        return FabricCost(messages=messages, front_ns=front_ns)
    rows = np.array([(1.0, pull.num_spans, pull.num_bytes) for pull in pulls])
    durations = np.array([float(pull.duration_ns) for pull in pulls])
    fixed_ns, span_ns, byte_ns = fit(rows, durations)
    bytes_per_s = NS_PER_S / max(byte_ns, NS_PER_BYTE_MIN)
    return FabricCost(
        latency_ns=int(fixed_ns),
        span_ns=int(span_ns),
        inner_bytes_per_s=bytes_per_s,
        card_bytes_per_s=bytes_per_s,
        messages=messages,
        front_ns=front_ns,
    )
