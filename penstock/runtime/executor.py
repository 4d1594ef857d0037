"""`ThreadExecutor`: the executor port, a model behind one thread."""

import time
from collections.abc import Callable

from penstock.core.events import StepDone
from penstock.core.step import Sampled, Step
from penstock.core.types import Digest
from penstock.runtime.lane import Lane


class ThreadExecutor:
    """Runs `execute` for one step at a time, and then `digest` of the blocks that it completed.

    A step that raises is answered with `error` set, and its traceback is on stderr; what then
    becomes of the worker is for its core and its process to say.
    """

    def __init__(
        self,
        execute: Callable[[Step], tuple[Sampled, ...]],
        *,
        digest: Callable[[Step], tuple[tuple[Digest, ...], ...]] = lambda _step: (),
        prepare: Callable[[], None] = lambda: None,
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._now = now
        self._given_ns = 0
        self._execute = execute
        self._digest = digest
        self._lane: Lane[StepDone] = Lane("steps", on_crash=self._crash, prepare=prepare)
        self._done: Callable[[StepDone], None] | None = None
        self._step_id = 0
        self._started_ns = 0

    def start(self) -> None:
        """Start the thread."""
        self._lane.start()

    def run(self, step: Step, done: Callable[[StepDone], None]) -> None:
        """Start the step and return."""
        assert self._done is None, f"step {step.step_id} while {self._step_id} is under way"
        self._step_id, self._done = step.step_id, done
        self._given_ns = time.monotonic_ns()
        self._lane.do(lambda: self._timed(step), self._finish)

    @property
    def step_age_ns(self) -> int:
        """How long the step under way has taken so far; 0 when there is none."""
        return time.monotonic_ns() - self._given_ns if self._done is not None else 0

    def close(self, timeout_s: float) -> bool:
        """End after the step under way; False when it takes longer than `timeout_s`."""
        return self._lane.close(timeout_s)

    def _timed(self, step: Step) -> StepDone:
        started_ns = self._started_ns = self._now()
        sampled = self._execute(step)
        return StepDone(
            step_id=step.step_id,
            sampled=sampled,
            digests=self._digest(step),
            started_ns=started_ns,
            finished_ns=self._now(),
        )

    def _finish(self, event: StepDone) -> None:
        done, self._done = self._done, None
        assert done is not None, event.step_id
        done(event)

    def _crash(self, error: BaseException) -> None:
        now_ns = self._now()
        event = StepDone(
            step_id=self._step_id,
            sampled=(),
            started_ns=self._started_ns or now_ns,
            finished_ns=now_ns,
            error=f"{type(error).__name__}: {error}",
        )
        if self._done is not None:
            self._finish(event)
