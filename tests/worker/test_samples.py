"""What a worker says of its steps and pulls: the numbers, the kinds, and how many."""

import numpy as np
from msgspec import structs

from penstock.core.events import MoveDone, StepDone
from penstock.core.messages import Load
from penstock.core.request import SamplingParams
from penstock.core.step import PullSample, Sampled, SampleRow, Step, StepSample
from penstock.core.types import WorkerId
from penstock.worker.samples import SAMPLES_MAX, Samples

LOAD = Load(
    worker_id=WorkerId("w"),
    waiting=1,
    running=2,
    handing_off=3,
    free_blocks=(4,),
    cached_blocks=(5,),
)


def step(*parts: tuple[int, int]) -> Step:
    """A step of (new, computed) tokens a sequence."""
    new = [n for n, _ in parts]
    return Step(
        step_id=1,
        token_ids=np.zeros(sum(new), np.int64),
        num_new=np.array(new, np.int32),
        num_computed=np.array([c for _, c in parts], np.int32),
        block_tables=(),
        samples=(),
    )


def done(duration_ns: int) -> StepDone:
    return StepDone(step_id=1, sampled=(), started_ns=100, finished_ns=100 + duration_ns)


def moved(duration_ns: int, error: str | None = None) -> MoveDone:
    return MoveDone(
        move_id=1,
        num_bytes=4096,
        num_spans=2,
        transport="shm",
        started_ns=5,
        finished_ns=5 + duration_ns,
        error=error,
    )


def test_a_step_is_reported_by_what_it_had_to_do() -> None:
    samples = Samples()
    samples.note_step(step((1, 9), (1, 19), (100, 50)), done(7))
    samples.note_step(step((1, 4)), done(3))
    assert samples.move_to(LOAD).step_samples == (
        StepSample(100, 100 * 100 + 2 * 100 * 50, 2, 30, 7),
        StepSample(0, 0, 1, 5, 3),
    )
    assert samples.move_to(LOAD) == LOAD


def test_many_decodes_do_not_crowd_out_a_prefill() -> None:
    samples = Samples()
    samples.note_step(step((8, 0)), done(1))
    for duration_ns in range(100):
        samples.note_step(step((1, 5)), done(duration_ns))
    taken = samples.move_to(LOAD).step_samples
    assert [s.duration_ns for s in taken] == [1, *range(100 - SAMPLES_MAX, 100)]


def test_of_rounds_in_a_row_one_is_reported() -> None:
    samples = Samples()
    row = SampleRow(0, SamplingParams(), 1, 5, [])
    once = step((1, 4))
    thrice = structs.replace(once, samples=(row,))
    samples.note_step(thrice, structs.replace(done(30), sampled=(Sampled(1),) * 3))
    assert samples.move_to(LOAD).step_samples == (StepSample(0, 0, 1, 5, 10),)


def test_a_pull_that_failed_says_nothing() -> None:
    samples = Samples()
    samples.note_pull(WorkerId("p"), moved(9))
    samples.note_pull(WorkerId("p"), moved(9, error="cut"))
    assert samples.move_to(LOAD).pull_samples == (PullSample(WorkerId("p"), 4096, 2, 9),)
    assert samples.move_to(LOAD) == LOAD
