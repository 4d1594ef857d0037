"""The worker process: a core in a node, its executor, its messages and its moves.

Runs in a process that the host forked. Which core, which model and which transport is said by the
composition root, as `WorkerParts`. It ends when told to stop, when the front is gone, and on any
exception: a bug in one worker costs its requests one retry elsewhere.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import WorkerConfig
from penstock.core.events import Move, MoveDone
from penstock.core.messages import (
    Endpoint,
    Hello,
    Message,
    PeerDown,
    PeerUp,
    RegionDescriptor,
    Stop,
    WorkerInfo,
)
from penstock.core.node import Node
from penstock.core.ports import Core
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, Digest, WorkerId
from penstock.runtime.clock import LoopClock
from penstock.runtime.executor import ThreadExecutor
from penstock.runtime.journal import open_journal
from penstock.runtime.messaging import Messenger
from penstock.runtime.transport import LaneTransport

CONTROLLER_EPOCH = 0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What a composition root puts into a worker process, made there after the fork.

    `prepare` runs first on the executor's thread. `introduce` and `forget` tell the mover of peers.
    """

    core: Core
    execute: Callable[[Step], tuple[Sampled, ...]]
    digest: Callable[[Step], tuple[tuple[Digest, ...], ...]]
    prepare: Callable[[], None]
    move: Callable[[Move], MoveDone]
    introduce: Callable[[WorkerInfo], None]
    forget: Callable[[WorkerId, int], None]
    regions: tuple[RegionDescriptor, ...]
    endpoints: tuple[Endpoint, ...]
    engine: str


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where a worker process finds itself. `front_fd` ends when the front does."""

    folder: Path
    controller_address: str
    front_fd: int
    decision_log: str | None = None


def run_worker(config: WorkerConfig, parts: WorkerParts, place: WorkerPlace) -> None:
    """Serve until told to stop.

    Raises: whatever went wrong in a callback.
    """
    asyncio.run(_WorkerProcess(config, parts, place).serve())


class _WorkerProcess:
    def __init__(self, config: WorkerConfig, parts: WorkerParts, place: WorkerPlace) -> None:
        self._config = config
        self._parts = parts
        self._place = place

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(self._fail)
        loop.add_reader(self._place.front_fd, self._leave)
        config = self._config
        self._messenger = Messenger(
            config.worker_id, config.epoch, self._place.folder, self._receive
        )
        executor = ThreadExecutor(
            self._parts.execute, digest=self._parts.digest, prepare=self._parts.prepare
        )
        transport = LaneTransport(self._messenger, self._parts.move)
        log = open_journal(self._place.decision_log, f".{config.worker_id}.{config.epoch}")
        self._node = Node(
            self._parts.core,
            clock=LoopClock(loop),
            transport=transport,
            executor=executor,
            log=log,
        )
        self._messenger.open()
        self._messenger.connect(CONTROLLER, CONTROLLER_EPOCH, self._place.controller_address)
        executor.start()
        transport.start()
        self._messenger.send(CONTROLLER, Hello(info=self._info()))
        try:
            await self._end
        finally:
            self._messenger.close()

    def _info(self) -> WorkerInfo:
        config = self._config
        return WorkerInfo(
            worker_id=config.worker_id,
            role=config.role,
            epoch=config.epoch,
            address=self._messenger.address,
            pid=os.getpid(),
            layout=config.layout,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            regions=self._parts.regions,
            endpoints=self._parts.endpoints,
            engine=self._parts.engine,
        )

    def _receive(self, message: Message) -> None:
        match message:
            case Stop(reason=reason):
                if reason:
                    _log.error("%s is refused: %s", self._config.worker_id, reason)
                if not self._end.done():
                    self._end.set_result(None)
                return
            case PeerUp(info=info):
                self._messenger.connect(info.worker_id, info.epoch, info.address)
                self._parts.introduce(info)
            case PeerDown(worker_id=worker_id, epoch=epoch):
                self._messenger.forget(worker_id, epoch)
                self._parts.forget(worker_id, epoch)
        self._node.deliver(message)

    def _fail(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A callback raised: end with its exception."""
        error = context.get("exception")
        if not isinstance(error, BaseException):
            _log.error("%s", context.get("message"))
        elif not self._end.done():
            self._end.set_exception(error)

    def _leave(self) -> None:
        """The front is gone, and with it whoever would read a word about it."""
        os._exit(1)
