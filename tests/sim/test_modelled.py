"""The modelled executor alone: when a step ends, and what a stop does to one that is repeated."""

import numpy as np

from penstock.core.events import StepDone
from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.core.types import NS_PER_MS
from penstock.sim.clock import SimClock
from penstock.sim.modelled import TOKEN, ModelledExecutor
from penstock.sim.profile import StepTimes

TIMES = StepTimes(a=1.0, b=0.01, c=0.0, d=2.0, e=0.5, f=0.0)


def step(*parts: tuple[int, int], repeats: int = 1) -> Step:
    """A step of (new, computed) tokens a sequence, all of them sampled."""
    new, computed = zip(*parts, strict=True)
    rows = [SampleRow(i, SamplingParams(), 1, 1, []) for i in range(len(parts))]
    return Step(
        step_id=7,
        token_ids=np.zeros(sum(new), np.int64),
        num_new=np.array(new, np.int32),
        num_computed=np.array(computed, np.int32),
        block_tables=(),
        samples=tuple(rows),
        repeats=repeats,
    )


def run(asked: Step, *stops_ms: float) -> tuple[list[StepDone], ModelledExecutor]:
    clock, ended = SimClock(), []
    executor = ModelledExecutor(clock, TIMES)
    for at_ms in stops_ms:
        clock.call_at(int(at_ms * NS_PER_MS), executor.stop)
    executor.run(asked, ended.append)
    assert clock.run(until_ns=10**12)
    return ended, executor


def test_prompts_and_decodes_take_what_the_formula_says() -> None:
    (done,), executor = run(step((100, 0), (1, 50), (1, 9)))
    assert done.finished_ns == 4 * NS_PER_MS
    assert [s.token_id for s in done.sampled] == [TOKEN] * 3
    assert executor.busy_ns == executor.prefill_ns == done.finished_ns


def test_a_repeated_step_ends_after_all_its_rounds() -> None:
    (done,), executor = run(step((1, 50), (1, 9), repeats=5))
    assert done.finished_ns == 15 * NS_PER_MS
    assert len(done.sampled) == 10
    assert (executor.num_steps, executor.prefill_ns) == (5, 0)


def test_a_stop_ends_it_with_the_round_under_way_and_counts_once() -> None:
    (done,), executor = run(step((1, 50), (1, 9), repeats=5), 6.5, 7.0, 100.0)
    assert done.finished_ns == 9 * NS_PER_MS
    assert len(done.sampled) == 6
    assert executor.busy_ns == 9 * NS_PER_MS
    (at_once,), _ = run(step((1, 50), (1, 9), repeats=5), 0.0)
    assert len(at_once.sampled) == 2


def test_a_stop_at_the_end_of_a_round_ends_it_there() -> None:
    (done,), _ = run(step((1, 50), (1, 9), repeats=5), 6.0)
    assert done.finished_ns == 6 * NS_PER_MS
