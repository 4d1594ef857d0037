"""The executor port over a thread."""

import asyncio
import time

import numpy as np
import pytest

from penstock.core.events import StepDone
from penstock.core.request import SamplingParams
from penstock.core.step import Sampled, SampleRow, Step
from penstock.runtime.executor import Rounds, ThreadExecutor


def step(step_id: int) -> Step:
    one = np.zeros(1, np.int32)
    return Step(step_id, np.zeros(1, np.int64), one, one, (np.zeros((1, 1), np.int32),), ())


def test_each_step_is_answered_once_with_its_times():
    async def run() -> None:
        def execute(step: Step) -> tuple[Sampled, ...]:
            time.sleep(0.01)
            return (Sampled(step.step_id),)

        executor = ThreadExecutor(execute)
        executor.start()
        answers: asyncio.Queue[StepDone] = asyncio.Queue()
        before_ns = time.monotonic_ns()
        for step_id in (5, 6):
            executor.run(step(step_id), answers.put_nowait)
            answer = await asyncio.wait_for(answers.get(), 10)
            assert answer.step_id == step_id
            assert answer.sampled == (Sampled(step_id),)
            assert answer.error is None
            assert before_ns <= answer.started_ns <= answer.finished_ns - 9_000_000
            before_ns = answer.finished_ns
        assert answers.empty()
        assert executor.close(5)

    asyncio.run(run())


def test_a_second_step_at_once_is_a_bug():
    async def run() -> None:
        executor = ThreadExecutor(lambda step: ())
        executor.run(step(1), lambda event: None)
        with pytest.raises(AssertionError, match="step 2 while 1 is under way"):
            executor.run(step(2), lambda event: None)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_raises_is_answered_with_its_error():
    async def run() -> None:
        def execute(step: Step) -> tuple[Sampled, ...]:
            raise ValueError("no such block")

        executor = ThreadExecutor(execute)
        executor.start()
        answers: asyncio.Queue[StepDone] = asyncio.Queue()
        executor.run(step(7), answers.put_nowait)
        answer = await asyncio.wait_for(answers.get(), 10)
        assert (answer.step_id, answer.error) == (7, "ValueError: no such block")
        assert executor.close(5)

    asyncio.run(run())


def decode_step(step_id: int, repeats: int) -> Step:
    params = SamplingParams(seed=0)
    return Step(
        step_id=step_id,
        token_ids=np.zeros(1, np.int64),
        num_new=np.ones(1, np.int32),
        num_computed=np.array([2], np.int32),
        block_tables=(np.array([[8, 9]], np.int32),),
        samples=(SampleRow(0, params, 1, 3, []),),
        digests_of=((),),
        repeats=repeats,
    )


def test_rounds_are_reported_one_by_one_until_the_step_is_ended():
    async def run() -> None:
        def rounds(step: Step, is_wanted):
            for number in range(step.repeats):
                # What came before has been heard of by now.
                assert len(reported) == number
                goes_on = number + 1 < step.repeats and is_wanted()
                yield (Sampled(100 + number),), goes_on
                if not goes_on:
                    return

        digested: list[tuple[int, ...]] = []

        def digest(step: Step):
            digested.append(step.digests_of[0])
            return ((),)

        heard: asyncio.Queue[StepDone] = asyncio.Queue()
        taken: list[StepDone] = []
        reported: list[StepDone] = []

        def hear(event: StepDone) -> None:
            reported.append(event)
            heard.put_nowait(event)

        executor = ThreadExecutor(lambda step: (), digest=digest, rounds=Rounds(rounds, 4))
        executor.start()
        executor.run(decode_step(3, repeats=4), hear)
        while len(taken) < 4:
            taken.append(await asyncio.wait_for(heard.get(), 10))
        assert [event.sampled[0].token_id for event in taken] == [100, 101, 102, 103]
        assert [event.goes_on for event in taken] == [True, True, True, False]
        # The second round fills slots 3, the last of block 8.
        assert digested == [(), (8,), (), ()]
        ends = [event.finished_ns for event in taken]
        assert [event.started_ns for event in taken[1:]] == ends[:-1]

        reported.clear()
        executor.end(4)
        executor.run(decode_step(4, repeats=4), hear)
        assert not (await asyncio.wait_for(heard.get(), 10)).goes_on
        assert executor.close(5)

    asyncio.run(run())
