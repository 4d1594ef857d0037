"""`Sizing`: how many workers there should be, where some may be started and retired by themselves.

Looks at the loads that `control/roles.py` measures, after it has looked:

    start    one side has been full for a while, and no worker of the other could change sides to
             help: as many as bring both loads to `roles.TARGET_LOAD`, at most as many again as
             there are, for the side that is fuller
    retire   a side could do with one fewer, and the rest would still be half empty, for longer

Between two changes there is a pause in which what was started comes up and loads settle, and what
would be started again soon is not retired: the two thresholds are far apart, and retiring waits
much longer. A retired worker finishes what it has. Never the last one of a side goes, nor one whose
role a person has pinned, nor one of another host: whoever sat down there has started it.

Decides; the runtime starts and retires (`Resize`). Called by the controller.
"""

from dataclasses import dataclass
from typing import Final

from penstock.control.fleet import Fleet
from penstock.control.record import WorkerRecord
from penstock.control.roles import Loads, Roles
from penstock.core.config import ControllerConfig
from penstock.core.events import Command, Send
from penstock.core.messages import Resize
from penstock.core.service import WorkerLimits
from penstock.core.types import FRONT, NS_PER_MS, NS_PER_S, Role

GROW_ABOVE: Final = 1.0
SHRINK_BELOW: Final = 0.5
"""With one worker fewer; far below what starts one."""
GROW_LOOKS: Final = 3
"""Looks in a row at which a side must be full: a wave is over before."""
START_NS: Final = 60 * NS_PER_S
"""After so long what was asked for and has not come is asked for again."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a look would like: the side (None for workers that do both) and which way."""

    is_growing: bool
    side: Role | None


class Sizing:
    """Looks at regular times and says what is to change. Changes no worker itself."""

    def __init__(self, config: ControllerConfig, fleet: Fleet, roles: Roles) -> None:
        self.num_started = 0
        self.num_retired = 0
        self._config = config
        self._fleet = fleet
        self._roles = roles
        self._wish: _Wish | None = None
        self._wished_ns = 0
        self._num_looks = 0
        self._changed_ns: int | None = None
        self._num_asked = 0

    @property
    def is_on(self) -> bool:
        """True when workers may come and go."""
        return self._config.workers_max > 0

    @property
    def is_needed(self) -> bool:
        """True while there is somebody to retire, whether or not there is work."""
        return self.is_on and len(self._ours()) > self._config.workers_min

    @property
    def limits(self) -> WorkerLimits:
        """What may be, and what was done so far."""
        config = self._config
        return WorkerLimits(
            least=config.workers_min,
            most=config.workers_max,
            started=self.num_started,
            retired=self.num_retired,
        )

    def look(self, now_ns: int) -> list[Command]:
        """Return what the runtime is to change now, if anything. Call after `Roles.look`."""
        if self._changed_ns is not None and now_ns - self._changed_ns > START_NS:
            self._num_asked = 0
        wish = self._wanted() if self.is_on else None
        if wish is None or wish != self._wish:
            self._wish, self._wished_ns, self._num_looks = wish, now_ns, 0
        self._num_looks += 1
        if wish is None or not self._is_due(wish, now_ns):
            return []
        change = self._grow(wish) if wish.is_growing else self._shrink(wish)
        if change is None:
            return []
        self._wish, self._changed_ns = None, now_ns
        self.num_started += len(change.start)
        self.num_retired += change.retire is not None
        return [Send(FRONT, change)]

    def _is_due(self, wish: _Wish, now_ns: int) -> bool:
        pause_ns = self._config.resize_pause_ms * NS_PER_MS
        if self._changed_ns is not None and now_ns - self._changed_ns < pause_ns:
            return False
        if wish.is_growing:
            return self._num_looks >= GROW_LOOKS
        return now_ns - self._wished_ns >= self._config.retire_after_ms * NS_PER_MS

    # ----------------------------------------------------------------------------- what is wanted

    def _wanted(self) -> _Wish | None:
        loads, config = self._roles.loads, self._config
        num_ours = len(self._ours())
        if num_ours < self._num_asked:
            return None  # they are coming up, and loads are not what they will be
        if self._fullest(loads) >= GROW_ABOVE:
            has_room = num_ours < config.workers_max
            return _Wish(True, self._fuller(loads)) if has_room and not self._helps(loads) else None
        if num_ours <= config.workers_min or self._fleet.leaving:
            return None
        sides = [Role.PREFILL, Role.DECODE] if self._fleet.has_pairs else [None]
        spare = [(self._fullest(_without(loads, side)), side) for side in sides]
        spare = [(load, side) for load, side in spare if self._victim(side) is not None]
        load, side = min(spare, key=lambda each: each[0], default=(SHRINK_BELOW, None))
        return _Wish(False, side) if load < SHRINK_BELOW else None

    def _fullest(self, loads: Loads) -> float:
        """Return the larger load; of workers that do both, what the two kinds of work come to."""
        return loads.worst if self._fleet.has_pairs else loads.prefill + loads.decode

    def _fuller(self, loads: Loads) -> Role | None:
        if not self._fleet.has_pairs:
            return None
        return Role.PREFILL if loads.prefill > loads.decode else Role.DECODE

    def _helps(self, loads: Loads) -> bool:
        """Tell whether a worker that changes sides would do."""
        favours = self._roles.favours
        return favours is not None and loads.after(favours).worst < GROW_ABOVE

    def _ours(self) -> list[WorkerRecord]:
        """Return the workers that the runtime can start and retire, and has not retired yet."""
        return [w for w in self._fleet if not w.info.host and not w.is_leaving]

    # ------------------------------------------------------------------------------ what is changed

    def _grow(self, wish: _Wish) -> Resize | None:
        loads = self._roles.loads
        num_workers = sum(self._fleet.is_candidate(w) for w in self._fleet)
        num_ours = sum(not w.info.host for w in self._fleet)  # one that leaves is still there
        lacking = max(1, self._roles.wanted_workers() - num_workers)
        count = min(lacking, num_workers, self._config.workers_max - num_ours)
        if count < 1:
            return None
        self._num_asked = len(self._ours()) + count
        reason = self._describe(loads)
        start: list[Role] = []
        for _ in range(count):
            side = self._fuller(loads) if start else wish.side
            start.append(side or Role.MIXED)
            loads = _with(loads, side)
        return Resize(start=tuple(start), reason=reason)

    def _shrink(self, wish: _Wish) -> Resize | None:
        worker = self._victim(wish.side)
        if worker is None:
            return None
        self._num_asked = 0
        idle_s = self._config.retire_after_ms / 1e3
        reason = f"{self._describe(self._roles.loads)} for {idle_s:g} s"
        return Resize(retire=worker.info.worker_id, reason=reason)

    def _victim(self, side: Role | None) -> WorkerRecord | None:
        """Return who of a side would be missed least: the idlest, of those the one that came last;
        None when nobody may go.
        """
        there = [w for w in self._fleet if self._fleet.is_candidate(w) and side in (w.role, None)]
        if len(there) < 2:
            return None
        free = [w for w in reversed(there) if not w.is_pinned and not w.info.host]
        return min(free, key=lambda w: (w.num_requests, w.backlog_ns), default=None)

    def _describe(self, loads: Loads) -> str:
        return f"prefill load {loads.prefill:.2f}, decode load {loads.decode:.2f}"


def _with(loads: Loads, side: Role | None) -> Loads:
    """Return what loads would be with one more worker on a side; None is for both."""
    return _changed(loads, side, 1)


def _without(loads: Loads, side: Role | None) -> Loads:
    return _changed(loads, side, -1)


def _changed(loads: Loads, side: Role | None, by: int) -> Loads:
    num_prefill = loads.num_prefill + (by if side is not Role.DECODE else 0)
    num_decode = loads.num_decode + (by if side is not Role.PREFILL else 0)
    return Loads(
        loads.prefill * loads.num_prefill / max(num_prefill, 1),
        loads.decode * loads.num_decode / max(num_decode, 1),
        num_prefill,
        num_decode,
    )
