"""The worker process: a core in a node, its executor, its messages and its moves.

Runs in a process that the host forked. Which core, which model and which transport is said by the
composition root, as `WorkerParts`. It ends when told to stop, when the process that started it is
gone, and on any exception: a bug in one worker costs its requests one retry elsewhere. On another
host than the controller's it outlives the controller for a while, with its blocks, and looks for
the next one.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import Endpoint, RegionDescriptor, TierRegion, WorkerInfo
from penstock.core.errors import StartupFailed
from penstock.core.events import Move, MoveDone
from penstock.core.links import AskTime, TellTime, TryLinks
from penstock.core.membership import Ping
from penstock.core.messages import Cancel, Hello, Message, PeerDown, PeerUp, Stop
from penstock.core.node import Node
from penstock.core.ports import Core
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, Digest, RequestId, WorkerId
from penstock.runtime.clock import HostTime, LoopClock
from penstock.runtime.executor import Observe, Rounds, ThreadExecutor
from penstock.runtime.heart import Heart, Return
from penstock.runtime.journal import open_journal
from penstock.runtime.links import LinkTester, Probe
from penstock.runtime.messaging import Messenger, open_network
from penstock.runtime.settings import NetworkSettings, PulseSettings
from penstock.runtime.transport import LaneTransport

CONTROLLER_EPOCH = 0
_log = logging.getLogger(__name__)


class KnowsPeers(Protocol):
    """Whoever reads what is another worker's."""

    def add_peer(self, info: WorkerInfo) -> None:
        """Know a peer; a new incarnation takes the place of the old one."""

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Let go of this incarnation; a newer one is left alone."""


@dataclass(frozen=True)
class WorkerEngine:
    """What runs a worker's steps, what its thread does first, and a line about it for people."""

    execute: Callable[[Step], tuple[Sampled, ...]]
    prepare: Callable[[], None]
    description: str
    rounds: Rounds | None = None
    observe: Observe = lambda _step: ()


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What a composition root puts into a worker process, made there after the fork.

    `prepare` runs first on the executor's thread. `peers` are told of peers that come and go.
    `requests` names all that the core knows of, `probe` tries every transport to a peer.
    """

    core: Core
    execute: Callable[[Step], tuple[Sampled, ...]]
    digest: Callable[[Step], tuple[tuple[Digest, ...], ...]]
    prepare: Callable[[], None]
    move: Callable[[Move], MoveDone]
    peers: tuple[KnowsPeers, ...]
    regions: tuple[RegionDescriptor, ...]
    endpoints: tuple[Endpoint, ...]
    engine: str
    requests: Callable[[], Iterable[RequestId]] = tuple
    tiers: tuple[TierRegion, ...] = ()
    rounds: Rounds | None = None
    observe: Observe = lambda _step: ()
    probe: Probe = lambda _info, _moved_bytes: ()


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where a worker process finds itself. `front_fd` ends when the process does that has the host
    started; `is_remote` when the controller is on another host, or could be.
    """

    folder: Path
    controller_address: str
    front_fd: int
    decision_log: str | None = None
    network: NetworkSettings | None = None
    pulse: PulseSettings = field(default_factory=PulseSettings)
    host: str = ""
    is_remote: bool = False
    is_same_machine: bool = True
    time: HostTime = field(default_factory=HostTime)


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
        config, place = self._config, self._place
        self._peers: dict[WorkerId, int] = {}
        self._num_returns = 0
        self._messenger = Messenger(
            config.worker_id,
            config.epoch,
            place.folder,
            self._receive,
            network=open_network(place.network) if place.network else None,
        )
        executor = ThreadExecutor(
            self._parts.execute,
            digest=self._parts.digest,
            observe=self._parts.observe,
            prepare=self._parts.prepare,
            now=place.time.now_ns,
            rounds=self._parts.rounds,
        )
        self._moves = LaneTransport(self._messenger, self._parts.move)
        self._links = LinkTester(
            config.worker_id,
            config.layout,
            self._parts.probe,
            send=self._messenger.send,
            now_ns=place.time.now_ns,
        )
        log = open_journal(self._place.decision_log, f".{config.worker_id}.{config.epoch}")
        self._node = Node(
            self._parts.core,
            clock=LoopClock(loop, place.time.now_ns),
            transport=self._moves,
            executor=executor,
            log=log,
        )
        self._messenger.open()
        self._messenger.connect(CONTROLLER, CONTROLLER_EPOCH, self._place.controller_address)
        executor.start()
        self._heart = Heart(
            self._messenger,
            place.pulse,
            step_age_ns=lambda: executor.step_age_ns,
            time=None if place.is_same_machine else place.time,
            returning=Return(let_go=self._let_go, hello=self._hello) if place.is_remote else None,
        )
        self._messenger.send(CONTROLLER, self._hello())
        beating = asyncio.ensure_future(self._heart.beat())
        try:
            await asyncio.wait([self._end, beating], return_when=asyncio.FIRST_COMPLETED)
            if beating.done():
                beating.result()
            self._end.result()
        finally:
            beating.cancel()
            self._messenger.close()

    def _hello(self) -> Hello:
        return Hello(info=self._info(), num_returns=self._num_returns)

    def _let_go(self) -> None:
        """Drop every request: whoever wanted them is gone. Blocks with a name stay in the cache."""
        self._num_returns += 1
        for request_id in tuple(self._parts.requests()):
            self._node.deliver(Cancel(request_id=request_id))
        for worker_id, epoch in self._peers.items():
            self._node.deliver(PeerDown(worker_id=worker_id, epoch=epoch))

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
            max_num_batched_tokens=config.max_num_batched_tokens,
            is_prefix_caching=config.is_prefix_caching,
            handoff=config.handoff,
            regions=self._parts.regions,
            endpoints=self._parts.endpoints,
            engine=self._parts.engine,
            remote_address=self._messenger.remote_address,
            host=self._place.host,
            tiers=self._parts.tiers,
        )

    def _receive(self, message: Message) -> None:
        match message:
            case Ping():
                self._heart.hear(message)
                return
            case TryLinks() | AskTime() | TellTime():
                self._links.hear(message)
                return
            case Stop(reason=reason):
                if reason and not self._end.done():
                    self._end.set_exception(StartupFailed(reason))
                elif not self._end.done():
                    self._end.set_result(None)
                return
            case PeerUp(info=info):
                route = self._messenger.route(info.address, info.remote_address)
                self._messenger.connect(info.worker_id, info.epoch, route)
                self._peers[info.worker_id] = info.epoch
                for known in (*self._parts.peers, self._links):
                    known.add_peer(info)
            case PeerDown(worker_id=worker_id, epoch=epoch):
                self._peers.pop(worker_id, None)
                self._messenger.forget(worker_id, epoch)
                for known in (*self._parts.peers, self._links):
                    known.forget(worker_id, epoch)
                self._moves.forget(worker_id)
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
