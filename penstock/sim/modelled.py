"""`ModelledExecutor` takes the time a step takes on some hardware and computes nothing.

Tokens are all the same, digests are not taken, blocks hold no bytes: what is left is when things
happen, which is what a performance simulation asks. Correctness is the business of
`penstock/sim/executor.py`.

A step that may be repeated is run until it has been repeated often enough or until `stop`: then it
ends with the repetition under way. That is what makes hours of decoding cheap, and it changes
nothing: between two things that happen to a worker its decode steps follow from each other.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.events import StepDone
from penstock.core.step import Sampled, Step
from penstock.core.types import NS_PER_MS
from penstock.sim.clock import SimClock
from penstock.sim.profile import Batches, Kind, Spread, StepTimes, size_of
from penstock.sim.stretches import Stretches

TOKEN = 1
"""The token that every step draws; outputs end by their length."""
_SAMPLED = Sampled(TOKEN)


@dataclass(slots=True)
class _Run:
    """A step under way: repetition i takes `first_ns + i * growth_ns`."""

    step: Step
    done: Callable[[StepDone], None]
    started_ns: int
    first_ns: float
    growth_ns: float
    has_prefill: bool
    repeats: int

    def duration_ns(self, repeats: int) -> int:
        return int(repeats * self.first_ns + self.growth_ns * (repeats * (repeats - 1) / 2))


class ModelledExecutor:
    """The executor port of one simulated GPU worker, and its stop-watch.

    `num_steps` counts repetitions too. `speed` is beside that of the hardware; a change counts
    from the next step on.
    """

    def __init__(
        self,
        clock: SimClock,
        times: StepTimes,
        spread: Spread | None = None,
        is_crowded: Callable[[], bool] = lambda: False,
        *,
        seed: int = 0,
    ) -> None:
        self.num_steps = 0
        self.speed = 1.0
        self._busy_ns = 0
        self._prefill_ns = 0
        self._clock = clock
        self._times = times
        self._spread = spread
        self._draws: dict[Kind, Stretches[float]] = {}
        self._batches = Batches()
        self._rng = random.Random(seed)
        self._is_crowded = is_crowded
        self._run: _Run | None = None

    def run(self, step: Step, done: Callable[[StepDone], None]) -> None:
        """Answer at the simulated time at which the step would be over."""
        assert self._run is None, f"step {step.step_id} while another is under way"
        new = quadratic = batch = context = 0
        all_new, all_computed = step.num_new.tolist(), step.num_computed.tolist()
        for num_new, num_computed in zip(all_new, all_computed, strict=True):
            if num_new == 1:
                batch += 1
                context += num_computed + 1
            else:
                new += num_new
                quadratic += num_new * (num_new + 2 * num_computed)
        times, speed = self._times, self.speed
        first_ns = times.duration_ns(new, quadratic, batch, context) / speed
        if self._spread is not None:
            assert step.repeats == 1, f"step {step.step_id} is drawn, and may not be repeated"
            first_ns *= 1.0 if new else self._spread.bend(batch)
            has_newcomer = self._batches.has_newcomer(all_new, all_computed) and not new
            kind = Kind(new > 0, has_newcomer, self._is_crowded(), size_of(first_ns))
            first_ns *= self._draw(self._spread, kind)
        # Each repetition looks at one more token of every sequence.
        growth_ns = times.f * batch * NS_PER_MS / speed
        now_ns = self._clock.now_ns()
        run = _Run(step, done, now_ns, first_ns, growth_ns, new > 0, step.repeats)
        self._run = run
        self._end_after(run, step.repeats)

    def _draw(self, spread: Spread, kind: Kind) -> float:
        """Return a ratio of a step like this one."""
        if kind not in self._draws:
            self._draws[kind] = Stretches(spread.like(kind) or (1.0,), self._rng)
        return self._draws[kind].draw()

    def stop(self) -> None:
        """End the step under way with the repetition under way."""
        run = self._run
        if run is None or run.repeats == 1:
            return
        elapsed_ns = self._clock.now_ns() - run.started_ns
        repeats = 1
        while run.duration_ns(repeats) < elapsed_ns:
            repeats += 1
        if repeats < run.repeats:
            run.repeats = repeats
            self._end_after(run, repeats)

    def end(self, step_id: int) -> None:
        """Never asked: steps are repeated at one go here."""
        raise AssertionError(f"step {step_id} is not run in rounds")

    def continue_from(self, before: "ModelledExecutor") -> None:
        """Go on counting where the worker's life before has stopped."""
        self._busy_ns, self._prefill_ns = before.busy_ns, before.prefill_ns
        self.num_steps = before.num_steps

    @property
    def is_running(self) -> bool:
        """True while a step is under way."""
        return self._run is not None

    @property
    def busy_ns(self) -> int:
        """All time spent in steps so far."""
        return self._busy_ns + self._elapsed_ns()

    @property
    def prefill_ns(self) -> int:
        """The part of it spent in steps that computed prompts."""
        is_prefill = self._run is not None and self._run.has_prefill
        return self._prefill_ns + (self._elapsed_ns() if is_prefill else 0)

    def _elapsed_ns(self) -> int:
        return self._clock.now_ns() - self._run.started_ns if self._run is not None else 0

    def _end_after(self, run: _Run, repeats: int) -> None:
        ends_ns = run.started_ns + run.duration_ns(repeats)

        def end() -> None:
            if self._run is run and run.repeats == repeats:
                self._finish(run)

        self._clock.call_at(ends_ns, end)

    def _finish(self, run: _Run) -> None:
        duration_ns = run.duration_ns(run.repeats)
        self._run = None
        self.num_steps += run.repeats
        self._busy_ns += duration_ns
        self._prefill_ns += duration_ns if run.has_prefill else 0
        run.done(
            StepDone(
                step_id=run.step.step_id,
                sampled=(_SAMPLED,) * (len(run.step.samples) * run.repeats),
                started_ns=run.started_ns,
                finished_ns=run.started_ns + duration_ns,
            )
        )
