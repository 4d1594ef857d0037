"""A thread of its own: order, results on the loop's thread, and what a bug does."""

import asyncio
import threading

import pytest

from penstock.runtime.lane import Lane


def test_jobs_run_in_order_off_the_loop_and_report_on_it():
    async def run() -> None:
        lane: Lane[int] = Lane("test", on_crash=lambda error: None)
        lane.start()
        results: list[tuple[int, int]] = []
        finished = asyncio.Event()

        def take(number: int) -> None:
            results.append((number, threading.get_ident()))
            if number == 99:
                finished.set()

        threads: set[int] = set()

        def job(number: int) -> int:
            threads.add(threading.get_ident())
            return number

        for number in range(100):
            lane.do(lambda number=number: job(number), take)
        await asyncio.wait_for(finished.wait(), 10)
        assert [number for number, _ in results] == list(range(100))
        assert {thread for _, thread in results} == {threading.get_ident()}
        assert len(threads) == 1
        assert threading.get_ident() not in threads
        assert lane.close(5)

    asyncio.run(run())


def test_prepare_runs_first_on_the_thread():
    async def run() -> None:
        calls: list[tuple[str, str]] = []
        lane: Lane[None] = Lane(
            "mine",
            on_crash=lambda error: None,
            prepare=lambda: calls.append(("prepare", threading.current_thread().name)),
        )
        lane.start()
        done = asyncio.Event()
        lane.do(
            lambda: calls.append(("job", threading.current_thread().name)), lambda _: done.set()
        )
        await asyncio.wait_for(done.wait(), 10)
        assert calls == [("prepare", "mine"), ("job", "mine")]
        assert lane.close(5)

    asyncio.run(run())


def test_closing_waits_for_the_job_but_not_for_ever():
    async def run() -> None:
        release = threading.Event()
        lane: Lane[bool] = Lane("test", on_crash=lambda error: None)
        lane.start()
        lane.do(release.wait, lambda _: None)
        assert not lane.close(0.05)
        release.set()
        assert lane.close(5)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_that_raises_ends_the_lane_and_is_told():
    async def run() -> None:
        crash: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        lane: Lane[float] = Lane("test", on_crash=crash.set_result)
        lane.start()
        results: list[float] = []
        lane.do(lambda: 1 / 0, results.append)
        lane.do(lambda: 2.0, results.append)
        assert isinstance(await asyncio.wait_for(crash, 10), ZeroDivisionError)
        assert results == []
        assert lane.close(5)

    asyncio.run(run())
