"""`Roles`: how busy the two sides of the cluster are, and which worker should change sides.

Both loads are ratios to what the SLOs allow, 1 is full:

    prefill   the larger of: work assigned per time; time until a new prompt would begin, over TTFT
    decode    all sequences there are, over those that the decode workers could run within the TPOT;
              or the tokens a second that those which come are expected to want, over those that
              could be made so; or the tokens of KV to be held, over what can; or the time until
              prompts that are computed have arrived, over TTFT: few decode workers have few links

What waits at the controller counts on the side that it waits for: where a prefill worker would take
the next one, all of them wait for seats or room to decode.

regime      means
normal      neither side is full
imbalanced  one side is full, the other half empty at most
overloaded  both are full, or one and nothing is to be had from the other

A worker changes sides when the side that it leaves stays clearly below what the other one has now
(hysteresis) and is not full itself, when that has been so for several looks in a row, and when the
last change is some time ago (cooldown; less for more of the same, more for the way back while no
side is full, or when workers have come and gone before): what a flip must not do is be taken back.
A decode side that gives one has longer steps, so sequences stay and there are more of them than its
share; few of them vary more than many; and those that are not followed by as many are soon gone.
Where one leaves a side full several go at once, first those whose hardware is better at the work to
come than at theirs, then those of hosts that have most of that side, for they share a link, then
the idlest. A flip is a label: it holds from the next assignment on, moves no process and drops no
cache; sequences that decode where prompts come in now end there, or are moved where that pays
(`control/relocation.py`). A side never becomes empty, and a worker that a person has pinned stays.

Source: Arrow's loads (arXiv 2505.11916) in place of FlowKV's, whose formula is not published.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import exp, log2, sqrt
from typing import Final

from penstock.control.cost import B
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.queue import FairQueue
from penstock.control.record import WorkerRecord
from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_MS, NS_PER_S, Role

ACT_ABOVE: Final = 0.8
"""Loads below this are nobody's concern, however unequal."""
GAIN_MIN: Final = 0.15
"""Part of the larger load by which that of the side that gives must stay below it."""
FULL: Final = 0.9
"""No side gives what would bring it above this: it would want it back."""
SIGMAS: Final = 2.0
"""How far above the mean there may be sequences at once: few vary more than many."""
LOOKS_MIN: Final = 3
SMOOTHING: Final = 0.3
FLIPS_SHARE: Final = 4
"""At most one worker in so many changes sides at a time."""
SETTLE_SHARE: Final = 0.5
"""Of the cooldown, until more workers follow to the same side."""
WAY_BACK: Final = 4.0
"""Times the cooldown, until workers go the other way without a side that is full."""
PATIENCE_MAX: Final = 8.0
"""The same where they have come and gone again and again: no split is right, or all are full."""
TARGET_LOAD: Final = 0.8
USUAL_TOKENS: Final = 1000.0
"""Context of a sequence while none decodes."""


class Regime(Enum):
    """See the module's table."""

    NORMAL = "normal"
    IMBALANCED = "imbalanced"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class Loads:
    """How busy either side is, and how many workers it has."""

    prefill: float
    decode: float
    num_prefill: int
    num_decode: int

    @property
    def regime(self) -> Regime:
        """The regime that these loads mean."""
        larger, smaller = max(self.prefill, self.decode), min(self.prefill, self.decode)
        if larger < 1:
            return Regime.NORMAL
        return Regime.IMBALANCED if smaller <= 0.5 else Regime.OVERLOADED

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.prefill, self.decode)

    def of(self, role: Role) -> float:
        """Return that of one side."""
        return self.prefill if role is Role.PREFILL else self.decode

    def after(self, to: Role, for_prefill: float = 1.0, for_decode: float = 1.0) -> "Loads":
        """Return what they would be with one more worker on side `to`, from the other.

        What it is worth on either side is beside the mean worker there.
        """
        step = 1 if to is Role.PREFILL else -1
        left_prefill = self.num_prefill + step * for_prefill
        left_decode = self.num_decode - step * for_decode
        return Loads(
            self.prefill * self.num_prefill / max(left_prefill, 0.1),
            self.decode * self.num_decode / max(left_decode, 0.1),
            self.num_prefill + step,
            self.num_decode - step,
        )


class Roles:
    """Looks at the loads at regular times and names the workers that should change sides."""

    def __init__(self, config: ControllerConfig, fleet: Fleet, queue: FairQueue) -> None:
        self.loads = Loads(0.0, 0.0, 0, 0)
        self.num_flips = 0
        self._config = config
        self._fleet = fleet
        self._queue = queue
        self._work_ns = 0.0
        self._looked_ns = 0
        self._output_tokens = 0
        self._use = 0.0
        self._wanted_per_ns = 0.0
        self._wants_decode = 0.0
        self._landing_tokens = 0.0
        self._landed_per_ns = 0.0
        self._landed_tokens = 0
        self._landing_since_ns = 0
        self._context_tokens = USUAL_TOKENS
        self._favours: Role | None = None
        self._num_looks = 0
        self._flipped_ns: int | None = None
        self._flipped_to: Role | None = None
        self._patience = 1.0

    @property
    def is_needed(self) -> bool:
        """True when there is a worker that could change sides, or there may be another number."""
        if self._config.workers_max:
            return True
        if not self._config.is_switching_roles or not self._fleet.has_pairs:
            return False
        return any(len(self._side(role)) > 1 for role in (Role.PREFILL, Role.DECODE))

    def look(self, now_ns: int) -> list[tuple[WorkerRecord, Role]]:
        """Measure, and return who is to change to which side now. Changes no label."""
        self._measure(now_ns)
        favours = self._better()
        is_same = favours is not None and favours is self._favours
        self._num_looks = self._num_looks + 1 if is_same else 1
        self._favours = favours
        if not self._config.is_switching_roles:
            return []
        if favours is None or self._num_looks < LOOKS_MIN or not self._is_cool(favours, now_ns):
            return []
        flips = self._choose(favours)
        if flips:
            self._note_flips(favours, now_ns)
            self._num_looks = 0
            self.num_flips += len(flips)
        return [(worker, favours) for worker in flips]

    @property
    def favours(self) -> Role | None:
        """The side to which a worker that may change would clearly help, as of the last look."""
        return self._favours if self._config.is_switching_roles else None

    def wanted_workers(self) -> int:
        """Return how many workers would bring both loads to `TARGET_LOAD`, at least one a side."""
        loads = self.loads
        if loads.num_prefill and not self._fleet.has_pairs:
            both = (loads.prefill + loads.decode) * loads.num_prefill / TARGET_LOAD
            return max(1, round(both + 0.5))
        prefill = loads.prefill * loads.num_prefill / TARGET_LOAD
        decode = loads.decode * loads.num_decode / TARGET_LOAD
        return max(1, round(prefill + 0.5)) + max(1, round(decode + 0.5))

    def _is_cool(self, to: Role, now_ns: int) -> bool:
        if self._flipped_ns is None:
            return True
        cooldown_ns = self._config.role_cooldown_ms * NS_PER_MS
        if to is self._flipped_to:
            cooldown_ns *= SETTLE_SHARE
        else:
            cooldown_ns *= max(self._patience, 1.0 if self.loads.of(to) >= 1 else WAY_BACK)
        return now_ns - self._flipped_ns >= cooldown_ns

    def _note_flips(self, to: Role, now_ns: int) -> None:
        """Be more patient after a way back that came soon, and less after one that did not."""
        if self._flipped_ns is not None and to is not self._flipped_to:
            soon_ns = 4 * self._patience * self._config.role_cooldown_ms * NS_PER_MS
            is_soon = now_ns - self._flipped_ns < soon_ns
            self._patience *= 2.0 if is_soon else 0.5
            self._patience = min(max(self._patience, 1.0), PATIENCE_MAX)
        self._flipped_ns, self._flipped_to = now_ns, to

    def _side(self, role: Role) -> list[WorkerRecord]:
        """Return who works on a side: everybody on both where nobody is meant for one."""
        fleet = self._fleet
        is_both = not fleet.has_pairs
        return [w for w in fleet if (is_both or w.role is role) and fleet.is_candidate(w)]

    def _measure(self, now_ns: int) -> None:
        prefill, decode = self._side(Role.PREFILL), self._side(Role.DECODE)
        elapsed_ns = max(now_ns - self._looked_ns, 1)
        work_ns = self._fleet.work_ns - self._work_ns
        use = work_ns / (elapsed_ns * max(len(prefill), 1))
        # After a pause the past says nothing.
        is_after_pause = elapsed_ns > 10 * NS_PER_S
        weight = 1.0 if is_after_pause else SMOOTHING
        if is_after_pause or not self._fleet.landing_tokens:
            self._landing_since_ns = now_ns
        self._use += (use - self._use) * weight
        self._wants_decode += (self._waits_for_decode(prefill) - self._wants_decode) * weight
        wanted_per_ns = (self._fleet.output_tokens - self._output_tokens) / elapsed_ns
        self._wanted_per_ns += (wanted_per_ns - self._wanted_per_ns) * weight
        self._landing_tokens += (self._fleet.landing_tokens - self._landing_tokens) * weight
        landed_per_ns = (self._fleet.landed_tokens - self._landed_tokens) / elapsed_ns
        self._landed_per_ns += (landed_per_ns - self._landed_per_ns) * weight
        self._landed_tokens = self._fleet.landed_tokens
        self._looked_ns, self._work_ns = now_ns, self._fleet.work_ns
        self._output_tokens = self._fleet.output_tokens
        num_decodes = sum(w.num_decodes for w in decode)
        context_tokens = sum(w.context_tokens for w in decode)
        self._context_tokens = max(context_tokens / num_decodes, 1) if num_decodes else USUAL_TOKENS
        self.loads = Loads(
            max(self._use, self._lateness(prefill)),
            self._fullness(decode),
            len(prefill),
            len(decode),
        )

    def _waits_for_decode(self, prefill: list[WorkerRecord]) -> float:
        """Return 1 if requests wait although a prefill worker has a turn, else 0."""
        has_turn = any(self._fleet.prefill_closed[w.slot] < CLOSED for w in prefill)
        return float(has_turn and len(self._queue) > 0)

    def _lateness(self, workers: list[WorkerRecord]) -> float:
        """Return the time until a new prompt would begin, over the TTFT that is asked for."""
        if not workers:
            return 0.0
        per_token_ns = [float(self._fleet.coefficients[B, w.slot]) for w in workers]
        num_tokens = self._queue.num_tokens * (1 - self._wants_decode)
        queued_ns = num_tokens * sum(per_token_ns) / len(workers)
        waiting_ns = sum(w.backlog_ns for w in workers) + queued_ns
        return waiting_ns / len(workers) / self._slo_ttft_ns

    def _fullness(self, workers: list[WorkerRecord]) -> float:
        """Return the largest of the decode side's four loads."""
        if not workers:
            return 0.0
        seats = sum(map(self._seats, workers))
        most_per_ns = sum(map(self._tokens_per_ns, workers))
        # Those on workers that have changed sides, too: they are to come, or would else come back.
        others = [w for w in self._side(Role.PREFILL) if w not in workers]
        everybody = workers + others
        num_decodes = self._wants_decode * len(self._queue)
        num_decodes += sum(w.num_decodes for w in everybody)
        room = sum(w.capacity_tokens for w in workers)
        held = sum(w.taken_tokens for w in everybody) / max(room, 1)
        # What is on its way over what arrives; when it begins to come little has arrived yet, but
        # nothing has been on its way for longer than this.
        landing_ns = self._landing_tokens / max(self._landed_per_ns, 1e-12)
        late = min(landing_ns, self._looked_ns - self._landing_since_ns) / self._slo_ttft_ns
        return max(num_decodes / seats, self._wanted_per_ns / most_per_ns, held, late)

    @property
    def _slo_ttft_ns(self) -> float:
        return (self._config.slo_ttft_ms or self._config.usual_ttft_ms) * NS_PER_MS

    def _seats(self, worker: WorkerRecord) -> float:
        """Return how many sequences of the usual length a worker could decode within the TPOT."""
        slo_ms = self._config.slo_tpot_ms or self._config.usual_tpot_ms
        return _seats(worker, slo_ms * NS_PER_MS, self._context_tokens)

    def _tokens_per_ns(self, worker: WorkerRecord) -> float:
        """Return how many tokens a worker makes with all its seats taken."""
        seats = self._seats(worker)
        fixed, per_sequence, per_token = worker.decode_coefficients
        step_ns = fixed + seats * (per_sequence + per_token * self._context_tokens)
        return seats / max(step_ns, 1.0)

    def _speed(self, worker: WorkerRecord) -> float:
        """Return the tokens of prompts that a worker computes per ns."""
        return 1 / max(float(self._fleet.coefficients[B, worker.slot]), 1e-9)

    def _better(self) -> Role | None:
        """Return the side to which one more worker would clearly help, if any."""
        loads = self.loads
        if loads.worst < ACT_ABOVE or not self._fleet.has_pairs:
            return None
        to = Role.PREFILL if loads.prefill > loads.decode else Role.DECODE
        return to if self._choose(to) else None

    def _choose(self, to: Role) -> list[WorkerRecord]:
        """Return who is to change to a side: as many as it takes, but a share at a time."""
        giving = Role.DECODE if to is Role.PREFILL else Role.PREFILL
        sides = {role: self._side(role) for role in (to, giving)}
        speed = _mean(map(self._speed, sides[Role.PREFILL]))
        seats = _mean(map(self._seats, sides[Role.DECODE]))
        chosen: list[WorkerRecord] = []
        loads = self.loads
        stay = self._stay(sides[Role.DECODE])
        most = max(1, (loads.num_prefill + loads.num_decode) // FLIPS_SHARE)
        for worker in self._givers(sides[giving], sides[to], to)[:most]:
            for_prefill, for_decode = self._speed(worker) / speed, self._seats(worker) / seats
            after = loads.after(to, for_prefill, for_decode)
            is_needed = loads.of(to) >= (1.0 if chosen else ACT_ABOVE)
            is_needed &= len(sides[giving]) - len(chosen) > 1
            limit = min(loads.of(to) * (1 - GAIN_MIN), FULL)
            left = after.of(giving)
            if to is Role.PREFILL:
                left *= stay(left / max(self.loads.decode, 1e-9))
            if not is_needed or left > limit:
                break
            loads = after
            chosen.append(worker)
        return chosen

    def _stay(self, workers: list[WorkerRecord]) -> Callable[[float], float]:
        """Return what says how many times as many sequences there will be at once where each worker
        that decodes is to have a `share` times as many.

        Those that are replaced as they end stay longer, for steps are longer then; those that are
        not become fewer until a worker could come back.
        """
        num_coming = sum(w.arriving_tokens for w in workers) / self._context_tokens
        num_decodes = max(sum(w.num_decodes for w in workers) - num_coming, 1.0)
        fixed, per_sequence, per_token = (
            _mean(w.decode_coefficients[i] for w in workers) for i in range(3)
        )
        per_batch = per_sequence + per_token * self._context_tokens
        batch_ns = per_batch * num_decodes / max(len(workers), 1)
        made_per_ns = num_decodes / (fixed + batch_ns)
        replaced = min(self._wanted_per_ns / made_per_ns, 1.0)
        to_make = sum(w.kv_tokens - w.context_tokens for w in workers)
        soon_ns = self._config.role_cooldown_ms * NS_PER_MS
        rest = (1 - replaced) * exp(-made_per_ns * soon_ns / max(to_make, 1))
        most = 1 + SIGMAS / sqrt(num_decodes)

        def stay(share: float) -> float:
            longer = fixed / max(fixed + (1 - share) * batch_ns, 0.1 * fixed, 1.0)
            return (replaced * longer + rest) * most

        return stay

    def _givers(
        self, side: list[WorkerRecord], others: list[WorkerRecord], to: Role
    ) -> list[WorkerRecord]:
        """Return who of a side may change: first who is better at the other's work by a factor of
        two and more beside the rest, then of the host that has most of this side and least of the
        other, for its workers share a link, then the idlest.
        """
        sign = -1 if to is Role.PREFILL else 1
        crowd = Counter(w.info.host for w in side)
        crowd.subtract(w.info.host for w in others)
        ranks: dict[int, tuple[int, int]] = {}
        idlest = sorted(side, key=lambda w: (w.num_decodes, w.backlog_ns))
        for worker in idlest:
            advantage = log2(self._speed(worker) / self._seats(worker))
            ranks[worker.slot] = round(sign * advantage), -crowd[worker.info.host]
            crowd[worker.info.host] -= 2
        return sorted((w for w in idlest if not w.is_pinned), key=lambda w: ranks[w.slot])


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 1.0


def _seats(worker: WorkerRecord, slo_ns: float, context_tokens: float) -> float:
    """Return how many sequences of this length a worker could decode within a time per token."""
    fixed, per_sequence, per_token = worker.decode_coefficients
    by_time = (slo_ns - fixed) / (per_sequence + per_token * context_tokens)
    by_room = worker.capacity_tokens / context_tokens
    return max(1.0, min(by_time, by_room, worker.info.max_num_seqs))
