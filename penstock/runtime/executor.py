"""`ThreadExecutor`: the executor port, a model behind one thread.

Where the model can run rounds, a step that may be repeated is: each round is reported while the
next one is computed, until the step is ended or has been run as often as it may be.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import Final

from penstock.core.events import StepDone
from penstock.core.step import Sampled, Step, next_round
from penstock.core.types import Digest
from penstock.runtime.lane import Lane

HEARD_TIMEOUT_S: Final = 10.0
"""How long a step thread waits for a loop that has stopped, before it goes on without."""

Observe = Callable[[Step], tuple[tuple[float, ...], ...]]
"""From a step that is over to the scores of its observations."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """How a model runs a step again and again: `run(step, is_wanted)` yields what each round has
    sampled, and whether another one is under way; `is_wanted` is asked before one is begun.
    """

    run: Callable[[Step, Callable[[], bool]], Iterator[tuple[tuple[Sampled, ...], bool]]]
    block_size: int


class ThreadExecutor:
    """Runs `execute` for one step at a time, then `digest` of the blocks that it completed, and
    `observe` where it has observations.

    A step that raises is answered with `error` set, and its traceback is on stderr; what then
    becomes of the worker is for its core and its process to say.
    """

    def __init__(
        self,
        execute: Callable[[Step], tuple[Sampled, ...]],
        *,
        digest: Callable[[Step], tuple[tuple[Digest, ...], ...]] = lambda _step: (),
        observe: Observe = lambda _step: (),
        prepare: Callable[[], None] = lambda: None,
        now: Callable[[], int] = time.monotonic_ns,
        rounds: Rounds | None = None,
    ) -> None:
        self._now = now
        self._given_ns = 0
        self._execute = execute
        self._digest = digest
        self._observe = observe
        self._rounds = rounds
        self._ended_step = 0
        self._heard = Event()
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

    def end(self, step_id: int) -> None:
        """Begin no more rounds of that step; one that is under way is reported."""
        self._ended_step = step_id

    @property
    def step_age_ns(self) -> int:
        """How long the step under way has taken so far; 0 when there is none."""
        return time.monotonic_ns() - self._given_ns if self._done is not None else 0

    def close(self, timeout_s: float) -> bool:
        """End after the step under way; False when it takes longer than `timeout_s`."""
        return self._lane.close(timeout_s)

    def _timed(self, step: Step) -> StepDone:
        started_ns = self._started_ns = self._now()
        if self._rounds is None or step.repeats == 1:
            return self._done_with(step, self._execute(step), started_ns)
        step_id = step.step_id
        for sampled, goes_on in self._rounds.run(step, lambda: self._ended_step != step_id):
            event = self._done_with(step, sampled, started_ns, goes_on=goes_on)
            if not goes_on:
                return event
            self._heard.clear()
            self._lane.report(self._hear_round, event)
            # Whether there is to be a round behind the one under way is known once the core has
            # heard of this one; the device is busy meanwhile.
            self._heard.wait(HEARD_TIMEOUT_S)
            started_ns = self._started_ns = event.finished_ns
            step = next_round(step, sampled, self._rounds.block_size)
        raise AssertionError(f"step {step_id} had no last round")

    def _done_with(
        self, step: Step, sampled: tuple[Sampled, ...], started_ns: int, *, goes_on: bool = False
    ) -> StepDone:
        return StepDone(
            step_id=step.step_id,
            sampled=sampled,
            digests=self._digest(step),
            scores=self._observe(step) if step.observations else (),
            started_ns=started_ns,
            finished_ns=self._now(),
            goes_on=goes_on,
        )

    def _hear_round(self, event: StepDone) -> None:
        self._given_ns = time.monotonic_ns()
        assert self._done is not None, event.step_id
        self._done(event)
        self._heard.set()

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
