"""`Lane`: one thread that does jobs in order and reports on the event loop's thread.

The hand-over is a `SimpleQueue` one way and `call_soon_threadsafe` the other; a thread pool's
futures would cost three times as much, and a model step of a small model is shorter than that.
Used for model steps (`executor.py`) and for moves of KV blocks (`transport.py`).
"""

import asyncio
import sys
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Lane(Generic[Result]):
    """A thread of its own for jobs that block.

    A job that raises is a bug: the traceback goes to `threading.excepthook`, `on_crash` hears of it
    on the loop's thread, and the lane does nothing any more.
    """

    def __init__(
        self,
        name: str,
        *,
        on_crash: Callable[[BaseException], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Result], Callable[[Result], None]] | None]
        self._jobs = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._on_crash = on_crash
        self._prepare = prepare
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; `prepare` is the first thing that it calls."""
        self._thread.start()

    def do(self, job: Callable[[], Result], done: Callable[[Result], None]) -> None:
        """Queue `job`; its result goes to `done`."""
        self._jobs.put((job, done))

    def report(self, done: Callable[[Result], None], result: Result) -> None:
        """Tell of something before the job is over; for the job itself to call."""
        self._loop.call_soon_threadsafe(done, result)

    def finish(self) -> None:
        """Take no more jobs, and end when those that are queued are done. Does not wait."""
        self._jobs.put(None)

    def close(self, timeout_s: float) -> bool:
        """Finish what is queued and end; return False when that takes longer than `timeout_s`.

        Results of jobs that were still queued are delivered only if the loop goes on running.
        """
        self.finish()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        report = self._loop.call_soon_threadsafe
        try:
            self._prepare()
            while (entry := self._jobs.get()) is not None:
                job, done = entry
                report(done, job())
        finally:
            error = sys.exception()
            if error is not None and not self._loop.is_closed():
                report(self._on_crash, error)
