"""`Reporter`: what a worker says of itself, and how often: how full it is, what its latest steps
and pulls took, which named blocks came and went.

Decides nothing: it reads what the scheduler, the cache and the two desks own. The worker core calls
it after everything it handles.
"""

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Event, MoveDone, Send, StepDone
from penstock.core.messages import Load, TellNames
from penstock.core.residency import Survey
from penstock.core.step import Step
from penstock.core.types import CONTROLLER, WorkerId
from penstock.kv.cache import KVCache
from penstock.worker.decode import PullDesk
from penstock.worker.names import NameReports
from penstock.worker.samples import Samples
from penstock.worker.scheduler import Scheduler
from penstock.worker.source import SourceDesk
from penstock.worker.surveyor import Surveyor
from penstock.worker.tiers import TierDesk


class Reporter:
    """Says it once per interval while the worker is busy, and whenever it becomes idle."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        scheduler: Scheduler,
        offers: SourceDesk,
        pulls: PullDesk,
        tiers: TierDesk,
    ) -> None:
        self._config = config
        self._kv = kv
        self._scheduler = scheduler
        self._offers = offers
        self._pulls = pulls
        self._tiers = tiers
        self._names = NameReports(config, kv, tiers.has)
        self._surveyor = Surveyor(config, kv, offers, pulls, tiers)
        self._samples = Samples()
        self._reported_ns = -config.load_interval_ns
        self._is_due = False

    def note_step(self, step: Step, done: StepDone) -> None:
        """Remember what a step took."""
        self._samples.note_step(step, done)
        self._tiers.note_step(len(step.token_ids), done.finished_ns - done.started_ns)

    def note_pull(self, source: WorkerId, done: MoveDone) -> None:
        """Remember what a pull took."""
        self._samples.note_pull(source, done)

    def answer(self, event: Event, now_ns: int) -> list[Command]:
        """Answer who asks something of the worker; other events (`Stop`) are not for its core."""
        match event:
            case TellNames():
                self._names.begin_anew(self._tiers.names())
            case Survey():
                return [self._surveyor.answer(event, now_ns)]
            case _:
                pass
        return []

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return what is due to be said."""
        names = self._names.due(now_ns, is_idle=is_idle)
        return names + self._fullness(now_ns, is_idle=is_idle)

    def _fullness(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        if not is_idle:
            self._is_due = True
            if now_ns - self._reported_ns < self._config.load_interval_ns:
                return []
        elif not self._is_due:
            return []
        self._reported_ns = now_ns
        self._is_due = not is_idle
        return [Send(CONTROLLER, self._samples.move_to(self.load()))]

    def load(self) -> Load:
        """Return how full the worker is."""
        scheduler, kv, pulls = self._scheduler, self._kv, self._pulls
        return Load(
            worker_id=self._config.worker_id,
            waiting=len(scheduler.waiting) + len(pulls.pending),
            running=len(scheduler.running),
            handing_off=len(self._offers.crossings) + pulls.num_admitted,
            free_blocks=kv.free_blocks,
            cached_blocks=kv.cached_blocks,
            preemptions=scheduler.num_preempted,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            steps=scheduler.num_steps,
            pulls_corrupt=pulls.num_corrupt,
            pulls_stale=pulls.num_stale,
            pulls_recomputed=pulls.num_recomputed,
            leases_expired=self._offers.num_expired,
            fragmentation=kv.fragmentation,
            tiers=self._tiers.load(),
            prefetches=self._tiers.prefetches(),
        )
