"""`Defragmenter`: what a worker that has nothing else to do makes of its pools.

It plans moves of cached blocks within a pool (`kv/defragment.py`), has them copied, and gives the
copies the names when they have landed; the next long prompt then lies in one run. The worker core
asks it whenever it is idle. It looks at the pools at most once per interval, since that takes about
a millisecond, and again when a move has landed, until there is nothing to gain. A request that
comes meanwhile is not held up: nothing that it may use is locked.
"""

from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Move, MoveClass, MoveDone, Span, SubmitMove, WakeAt
from penstock.core.types import NS_PER_S, RequestId
from penstock.kv.cache import KVCache
from penstock.kv.defragment import plan_relocation
from penstock.kv.pool import Relocation
from penstock.transfer.plan import align
from penstock.worker.numbers import Numbers

BLOCKS_MAX: Final = 64
"""In one move: a pull that comes in behind it waits no longer than that takes."""
INTERVAL_NS: Final = NS_PER_S
DEFRAGMENT_KEY: Final = "defragment"
NOBODY: Final = RequestId("")


class Defragmenter:
    """Owns the one relocation under way, and whether another may be worth while."""

    def __init__(self, config: WorkerConfig, kv: KVCache, move_ids: Numbers) -> None:
        self.num_moved = 0
        self._config = config
        self._kv = kv
        self._move_ids = move_ids
        self._under_way: dict[int, tuple[int, list[Relocation]]] = {}
        self._is_due = False
        self._looks_ns = 0
        self._is_wake_due = False

    @property
    def is_busy(self) -> bool:
        """True while a move is under way, whose destinations are not free."""
        return bool(self._under_way)

    def wake(self) -> list[Command]:
        """Take in that the time has come to look again; `due` does."""
        self._is_wake_due = False
        return []

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return a move within a pool, if the worker is idle and some pool gains by it."""
        if not is_idle:
            self._is_due = self._config.is_defragmenting
            return []
        if not self._is_due or self._under_way:
            return []
        if now_ns < self._looks_ns:
            return self._wake_later()
        wanted = self._config.layout.num_blocks(self._config.max_model_len)
        for index, group in enumerate(self._kv.groups):
            relocations = plan_relocation(group.pool, BLOCKS_MAX, wanted=wanted)
            if relocations:
                return [self._begin(index, relocations)]
        self._is_due = False
        self._looks_ns = now_ns + INTERVAL_NS
        return []

    def _wake_later(self) -> list[Command]:
        if self._is_wake_due:
            return []
        self._is_wake_due = True
        return [WakeAt(self._looks_ns, DEFRAGMENT_KEY)]

    def land(self, done: MoveDone) -> bool:
        """Take in the end of a move; False when it is none of ours."""
        if done.move_id not in self._under_way:
            return False
        group, relocations = self._under_way.pop(done.move_id)
        pool = self._kv.groups[group].pool
        if done.error is None:
            self.num_moved += pool.end_relocation(relocations)
        else:
            pool.abort_relocation(relocations)
            self._is_due = False
        return True

    def _begin(self, group: int, relocations: list[Relocation]) -> Command:
        self._kv.groups[group].pool.begin_relocation(relocations)
        move_id = self._move_ids.next()
        self._under_way[move_id] = (group, relocations)
        spans: list[tuple[Span, ...]] = [()] * len(self._kv.groups)
        spans[group] = tuple(align(*zip(*relocations, strict=True)))
        move = Move(
            move_id=move_id,
            kind=MoveClass.RELOCATE,
            request_id=NOBODY,
            source=self._config.worker_id,
            epoch=self._config.epoch,
            spans=tuple(spans),
        )
        return SubmitMove(move)
