"""The executor port over a thread."""

import asyncio
import time

import numpy as np
import pytest

from penstock.core.events import StepDone
from penstock.core.step import Sampled, Step
from penstock.runtime.executor import ThreadExecutor


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
