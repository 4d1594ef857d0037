"""`Samples`: what this worker's latest steps and pulls took, for the controller's predictions.

Keeps a few of each kind between two reports: steps that compute prompts, steps of decodes alone,
pulls. What a step had to do is worked out when it is reported, not while steps are waiting.
"""

from collections import deque
from typing import Final

from msgspec import structs

from penstock.core.events import MoveDone, StepDone
from penstock.core.messages import Load
from penstock.core.step import Int32, PullSample, Step, StepSample
from penstock.core.types import WorkerId

SAMPLES_MAX: Final = 4
"""Of each kind in a report."""

_Taken = tuple[Int32, Int32, int]


class Samples:
    """The latest steps and pulls since they were last taken."""

    def __init__(self) -> None:
        self._prefills: deque[_Taken] = deque(maxlen=SAMPLES_MAX)
        self._decodes: deque[_Taken] = deque(maxlen=SAMPLES_MAX)
        self._pulls: deque[PullSample] = deque(maxlen=SAMPLES_MAX)

    def note_step(self, step: Step, done: StepDone) -> None:
        """Remember how long a step took; of one that was run several times, one round."""
        has_prefill = len(step.token_ids) > len(step.num_new)
        kind = self._prefills if has_prefill else self._decodes
        rounds = len(done.sampled) // len(step.samples) if step.samples else 1
        duration_ns = (done.finished_ns - done.started_ns) // max(rounds, 1)
        kind.append((step.num_new, step.num_computed, duration_ns))

    def note_pull(self, source: WorkerId, done: MoveDone) -> None:
        """Remember how long a pull took; one that failed says nothing."""
        if done.error is None and done.num_bytes:
            duration_ns = done.finished_ns - done.started_ns
            self._pulls.append(PullSample(source, done.num_bytes, done.num_spans, duration_ns))

    def move_to(self, load: Load) -> Load:
        """Return the report with all samples, and forget them."""
        steps = tuple(map(_sample, (*self._prefills, *self._decodes)))
        pulls = tuple(self._pulls)
        self._prefills.clear()
        self._decodes.clear()
        self._pulls.clear()
        return structs.replace(load, step_samples=steps, pull_samples=pulls)


def _sample(taken: _Taken) -> StepSample:
    prefill_tokens = prefill_work = decodes = context_tokens = 0
    num_new, num_computed, duration_ns = taken
    for new, computed in zip(num_new.tolist(), num_computed.tolist(), strict=True):
        if new == 1:
            decodes += 1
            context_tokens += computed + 1
        else:
            prefill_tokens += new
            prefill_work += new * (new + 2 * computed)
    return StepSample(prefill_tokens, prefill_work, decodes, context_tokens, duration_ns)
