"""`Supervisor`: keeps the processes of a local cluster alive.

Owns the host process and the incarnations of each worker: it has them started, notices their ends,
and replaces what dies, with a pause that grows and a limit per minute. What is lost with a worker
is the controller's affair; `LocalCluster` tells it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from penstock.core.errors import StartupFailed
from penstock.core.types import Role, WorkerId
from penstock.runtime.link import (
    Exited,
    Failed,
    Fork,
    Forked,
    Kill,
    Prepare,
    Progress,
    Ready,
    ToFront,
    WorkerSpec,
)
from penstock.runtime.process import HostProcess
from penstock.runtime.processes import describe_code
from penstock.runtime.settings import ModelFacts

RESTARTS_PER_WINDOW = 3
RESTART_WINDOW_S = 60.0
RESTART_PAUSES_S = (0.0, 1.0, 5.0)
END_TIMEOUT_S = 5.0
LEFT = describe_code(0)
"""How a worker ends that was told to."""
LOAD_TIMEOUT_S = 600.0
FETCH_TIMEOUT_S = 86400.0

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WorkerSlot:
    """One worker id through its incarnations. `pid` is None while no process is alive; one that is
    leaving is not replaced. One that is extra was added to a cluster that runs without it.
    """

    worker_id: WorkerId
    role: Role
    index: int
    epoch: int = 0
    pid: int | None = None
    is_up: bool = False
    is_leaving: bool = False
    is_extra: bool = False
    has_been_up: bool = False
    join_timer: asyncio.TimerHandle | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS_PER_WINDOW + 1))


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Whom the supervisor tells. `lost` gets the incarnation and why it ended; `failed` that the
    cluster cannot come up, or cannot stay up.
    """

    progress: Callable[[str, float], None]
    loaded: Callable[[ModelFacts], None]
    lost: Callable[[WorkerId, int, str], None]
    failed: Callable[[StartupFailed], None]


class Supervisor:
    """Lives on the running event loop from `start` to `stop`.

    Incarnations are counted from `last_epoch` + 1 on.
    """

    def __init__(
        self,
        prepare: Prepare,
        *,
        host: HostProcess,
        callbacks: Callbacks,
        last_epoch: int = 0,
    ) -> None:
        self._prepare = prepare
        self._settings = settings = prepare.settings
        self._last_epoch = last_epoch
        self._host = host
        self._callbacks = callbacks
        self._is_loaded = False
        self._is_stopping = False
        self._stage = "starting"
        self._silence_timer: asyncio.TimerHandle | None = None
        self._host_losses: deque[float] = deque(maxlen=RESTARTS_PER_WINDOW + 1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._retired_epochs: dict[WorkerId, int] = {}
        self.slots = {
            worker_id: WorkerSlot(worker_id=worker_id, role=role, index=index, epoch=last_epoch)
            for index, (worker_id, role) in enumerate(settings.workers().items())
        }

    @property
    def is_complete(self) -> bool:
        """True when the model is loaded and every worker is up."""
        return self._is_loaded and all(slot.is_up for slot in self.slots.values())

    def start(self) -> None:
        """Have the host load the model and fork the workers; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._host.watch(self._hear, self._host_ended, self._log_line)
        self._host.send(self._prepare)
        self._await_word()

    def joined(self, worker_id: WorkerId, epoch: int) -> None:
        """Take note that a worker has said hello."""
        slot = self.slots.get(worker_id)
        if slot is not None and slot.epoch == epoch:
            slot.is_up = slot.has_been_up = True
            _cancel_timer(slot)

    def kill(self, worker_id: WorkerId, epoch: int) -> None:
        """End an incarnation that counts as dead; it is replaced as any other."""
        slot = self.slots.get(worker_id)
        if slot is not None and slot.epoch == epoch and slot.pid is not None:
            self._host.send(Kill(worker_id, epoch))

    def retire(self, worker_id: WorkerId) -> None:
        """Replace this worker no more when it ends."""
        self.slots[worker_id].is_leaving = True

    def add(self, role: Role) -> WorkerId:
        """Start one more worker; the model must be loaded. Its id is the first that is free."""
        stem = f"{self._settings.host}-" if self._settings.host else ""
        names = (WorkerId(f"{role.value}-{stem}{number}") for number in count())
        worker_id = next(name for name in names if name not in self.slots)
        indices = {slot.index for slot in self.slots.values()}
        index = next(number for number in count() if number not in indices)
        epoch = max(self._last_epoch, self._retired_epochs.get(worker_id, 0))
        slot = WorkerSlot(worker_id=worker_id, role=role, index=index, epoch=epoch, is_extra=True)
        self.slots[worker_id] = slot
        self._fork(slot)
        return worker_id

    async def stop(self, timeout_s: float) -> None:
        """Wait until all workers have ended, at most `timeout_s`, and end the host."""
        self._is_stopping = True
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        deadline = self._loop.time() + timeout_s
        while any(slot.pid for slot in self.slots.values()) and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        for slot in self.slots.values():
            _cancel_timer(slot)
        await self._host.end(END_TIMEOUT_S)

    # -------------------------------------------------------------------------------- what is heard

    def _hear(self, message: ToFront) -> None:
        match message:
            case Progress(stage, fraction):
                self._stage = stage
                self._await_word()
                self._callbacks.progress(stage, fraction)
            case Ready(model):
                self._is_loaded = True
                if self._silence_timer is not None:
                    self._silence_timer.cancel()
                self._callbacks.loaded(model)
                for slot in self.slots.values():
                    self._fork(slot)
            case Failed(text):
                self._fail(text)
            case Forked(worker_id, epoch, pid):
                forked = self.slots.get(worker_id)
                if forked is not None and forked.epoch == epoch:
                    forked.pid = pid
            case Exited():
                self._worker_ended(message)

    def _await_word(self) -> None:
        """Give the host `start_timeout_s` from now to say that it has come further."""
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        is_local = Path(self._settings.engine.model).expanduser().is_dir()
        default_s = LOAD_TIMEOUT_S if is_local else FETCH_TIMEOUT_S
        timeout_s = self._settings.start_timeout_s or default_s
        self._silence_timer = self._loop.call_later(
            timeout_s,
            lambda: self._fail(f"nothing came of '{self._stage}' within {timeout_s:.0f} s"),
        )

    def _log_line(self, line: str) -> None:
        """Show what workers say; the host's own words matter only when it fails."""
        if line.startswith("["):
            _log.info("%s", line)

    def _worker_ended(self, event: Exited) -> None:
        slot = self.slots.get(event.worker_id)
        if slot is None or slot.epoch != event.epoch:
            return
        slot.is_up, slot.pid = False, None
        _cancel_timer(slot)
        if self._is_stopping:
            return
        if slot.is_leaving or (slot.has_been_up and event.reason == LEFT):
            self._remove(slot)
            self._callbacks.lost(slot.worker_id, slot.epoch, "it left")
            return
        ends = "\n".join(event.last_lines[-12:])
        if not slot.has_been_up and slot.is_extra:
            _log.error("worker %s ended while starting: %s\n%s", slot.worker_id, event.reason, ends)
            self._remove(slot)
            return
        if not slot.has_been_up and slot.epoch == self._last_epoch + 1:
            self._fail(f"worker {slot.worker_id} ended while starting ({event.reason})\n{ends}")
            return
        last = event.last_lines[-1] if event.last_lines else "it wrote nothing"
        reason = f"{event.reason}; {last}" if event.last_lines else event.reason
        _log.warning("worker %s is gone: %s", slot.worker_id, reason)
        self._callbacks.lost(slot.worker_id, slot.epoch, event.reason)
        self._replace(slot)

    def _remove(self, slot: WorkerSlot) -> None:
        """Forget a worker; a later one of its name counts on from its incarnations."""
        self._retired_epochs[slot.worker_id] = slot.epoch
        del self.slots[slot.worker_id]

    def _host_ended(self, reason: str) -> None:
        """The host takes every worker with it."""
        if self._is_stopping:
            return
        ends = "\n".join(list(self._host.last_lines)[-12:])
        if not self._is_loaded:
            self._fail(f"the process that loads the model ended ({reason})\n{ends}")
            return
        _log.error("the host process is gone: %s\n%s", reason, ends)
        for slot in self.slots.values():
            slot.is_up, slot.pid = False, None
            _cancel_timer(slot)
            self._callbacks.lost(slot.worker_id, slot.epoch, f"its host ended: {reason}")
        pause_s = _pause_after(self._host_losses, self._loop.time())
        if pause_s is None:
            self._fail("the host process keeps dying")
        else:
            self._spawn(self._restart_host(pause_s))

    # ------------------------------------------------------------------------ what is done about it

    def _fail(self, text: str) -> None:
        if not self._is_stopping:
            self._callbacks.failed(StartupFailed(text.strip()))

    def _give_up_waiting(self, slot: WorkerSlot, epoch: int) -> None:
        timeout_s = self._settings.worker_timeout_s
        _log.error("worker %s has not come up within %.0f s: killed", slot.worker_id, timeout_s)
        self._host.send(Kill(slot.worker_id, epoch))

    def _fork(self, slot: WorkerSlot) -> None:
        slot.epoch += 1
        spec = WorkerSpec(
            worker_id=slot.worker_id, role=slot.role, epoch=slot.epoch, index=slot.index
        )
        self._host.send(Fork(spec))
        slot.join_timer = self._loop.call_later(
            self._settings.worker_timeout_s, self._give_up_waiting, slot, slot.epoch
        )

    def _replace(self, slot: WorkerSlot) -> None:
        pause_s = _pause_after(slot.losses, self._loop.time())
        if pause_s is None:
            _log.error(
                "worker %s was lost %d times within %.0f s and is not started again",
                slot.worker_id,
                len(slot.losses),
                RESTART_WINDOW_S,
            )
        else:
            self._spawn(self._fork_after(slot, pause_s))

    async def _fork_after(self, slot: WorkerSlot, pause_s: float) -> None:
        if pause_s:
            await asyncio.sleep(pause_s)
        _log.warning("worker %s is started again, epoch %d", slot.worker_id, slot.epoch + 1)
        self._fork(slot)

    async def _restart_host(self, pause_s: float) -> None:
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await self._host.end(END_TIMEOUT_S)
        await asyncio.sleep(pause_s)
        self._is_loaded = False
        self._host = HostProcess.spawn(Path(self._prepare.folder))
        self.start()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cancel_timer(slot: WorkerSlot) -> None:
    if slot.join_timer is not None:
        slot.join_timer.cancel()
        slot.join_timer = None


def _pause_after(losses: deque[float], now_s: float) -> float | None:
    """Note a loss; return how long to wait before the restart, None when there were too many."""
    losses.append(now_s)
    recent = sum(now_s - loss < RESTART_WINDOW_S for loss in losses)
    return RESTART_PAUSES_S[recent - 1] if recent <= RESTARTS_PER_WINDOW else None
