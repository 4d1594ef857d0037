"""`JoinedHost`: a host that takes part in a cluster whose controller is elsewhere.

It asks to be let in, has a host process of its own load the cluster's model, and keeps the workers
alive that are forked there. The workers speak with the controller themselves; this process says how
they end, and ends those that the controller counts as dead. When the controller goes away, both
wait for one to come back at the same address.
"""

import asyncio
import logging
import platform
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from penstock.core.errors import StartupFailed, WorkersUnavailable
from penstock.core.membership import Admitted, Evict, Gone, Join, Leave, Ping, Refused
from penstock.core.messages import Message, PeerUp
from penstock.core.types import CONTROLLER, WorkerId
from penstock.core.version import VERSION
from penstock.runtime.curve import CurveKeys
from penstock.runtime.folder import RunFolder
from penstock.runtime.heart import Heart, Return
from penstock.runtime.knock import Door, knock
from penstock.runtime.link import Prepare
from penstock.runtime.membership import HOST_EPOCH
from penstock.runtime.messaging import Messenger, Network
from penstock.runtime.process import HostProcess
from penstock.runtime.protocol import machine_id, protocol_digest
from penstock.runtime.settings import ClusterSettings, ModelFacts, PulseSettings
from penstock.runtime.supervisor import Callbacks, Supervisor
from penstock.runtime.worker import CONTROLLER_EPOCH
from penstock.transport.key import cluster_key

ANSWER_TIMEOUT_S: Final = 10.0
ASK_INTERVAL_S: Final = 1.0
WORKER_END_TIMEOUT_S: Final = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """Which cluster to join, and how this host is reached from there.

    `listen_host` is one of this machine's addresses, by default the one that the cluster is called
    from; `advertised` what the others call, when that is another one.
    """

    host: str
    port: int
    name: str = ""
    listen_host: str = ""
    advertised: str = ""
    key_file: str | None = None
    pulse: PulseSettings = field(default_factory=PulseSettings)


class JoinedHost:
    """From `ask` to `stop`, on the running loop. `on_worker` hears of each worker that is in."""

    def __init__(self, settings: JoinSettings, folder: RunFolder) -> None:
        self.settings = settings
        self.stage = ("starting", 0.0)
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.on_worker: Callable[[WorkerId], None] = lambda worker_id: None
        self.model: ModelFacts | None = None
        self._folder = folder
        self._host_id = WorkerId(f"host-{secrets.token_hex(6)}")
        self._messenger: Messenger | None = None
        self._supervisor: Supervisor | None = None
        self._heart: Heart | None = None
        self._beating: asyncio.Future[None] | None = None
        self._is_known = False

    # ------------------------------------------------------------------------------------- joining

    async def ask(self) -> Admitted:
        """Find the cluster and ask to be let in; return what it serves.

        Raises: `StartupFailed` saying what to change: address, network, key or version.
        """
        settings = self.settings
        loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[Exception] = loop.create_future()
        """Done when this host can take part no more, with the reason."""
        self._answer: asyncio.Future[Admitted | Refused] = loop.create_future()
        key = cluster_key(Path(settings.key_file) if settings.key_file else None)
        keys = CurveKeys.derive(key)
        self.door = await knock(settings.host, settings.port, keys)
        self.listen_host = settings.listen_host or self.door.local_host
        self._messenger = Messenger(
            self._host_id,
            HOST_EPOCH,
            self._folder.path,
            self._receive,
            network=Network(keys, self.listen_host, 0, settings.advertised),
        )
        self._messenger.open()
        self._messenger.connect(CONTROLLER, CONTROLLER_EPOCH, self.door.address)
        answer = await self._wait_for_answer(self._messenger, self.door)
        if isinstance(answer, Refused):
            raise StartupFailed(f"{self.door} does not let this host in: {answer.reason}")
        self.admitted = answer
        now_ns = time.monotonic_ns()
        is_same_machine = answer.machine == machine_id() != ""
        middle_ns = answer.now_ns + (now_ns - answer.echo_ns) // 2
        self._clock_offset_ns = None if is_same_machine else middle_ns - now_ns
        return answer

    async def _wait_for_answer(self, messenger: Messenger, door: Door) -> Admitted | Refused:
        """Ask until there is an answer; a cluster that is still loading says at least a word."""
        deadline_s = asyncio.get_running_loop().time() + ANSWER_TIMEOUT_S
        while True:
            messenger.send(CONTROLLER, self._join())
            await asyncio.wait([self._answer], timeout=ASK_INTERVAL_S)
            if self._answer.done():
                return self._answer.result()
            if self._is_known:
                self.on_progress("waiting for the cluster to load its model", 0.0)
            elif asyncio.get_running_loop().time() > deadline_s:
                raise StartupFailed(
                    f"{door} can be reached from here, but does not reach this host at "
                    f"{messenger.remote_address.removeprefix('tcp://')}: give the address by which "
                    "it does with --advertise, and let a firewall pass it"
                )

    def _join(self) -> Join:
        assert self._messenger is not None
        return Join(
            host=self._host_id,
            address=self._messenger.remote_address,
            name=self.admitted.name if self._answer.done() else self._name(),
            version=VERSION,
            protocol=protocol_digest(),
            machine=machine_id(),
            sent_ns=time.monotonic_ns(),
        )

    def _name(self) -> str:
        return self.settings.name or platform.node().partition(".")[0]

    def start(self, settings: ClusterSettings) -> None:
        """Load the model and start the workers; returns at once. Call after `ask`."""
        assert self._messenger is not None
        prepare = Prepare(
            settings,
            str(self._folder.path),
            self.door.address,
            layout=self.admitted.layout,
            clock_offset_ns=self._clock_offset_ns,
        )
        self._supervisor = Supervisor(
            prepare,
            host=HostProcess.spawn(self._folder.path),
            callbacks=Callbacks(
                progress=self._progress, loaded=self._loaded, lost=self._lose, failed=self._fail
            ),
            last_epoch=self.admitted.epoch,
        )
        self._supervisor.start()
        self._heart = Heart(
            self._messenger,
            settings.pulse,
            returning=Return(let_go=lambda: None, hello=self._join),
        )
        self._beating = asyncio.ensure_future(self._beat(self._heart))

    async def _beat(self, heart: Heart) -> None:
        try:
            await heart.beat()
        except WorkersUnavailable as error:
            self._fail(error)

    # ------------------------------------------------------------------------------------- leaving

    @property
    def worker_ids(self) -> list[WorkerId]:
        """The workers of this host that have not left."""
        return list(self._supervisor.slots) if self._supervisor is not None else []

    async def leave(self, timeout_s: float) -> None:
        """Have every worker finish what it has, and leave; give up after `timeout_s`.

        What is not finished then is begun again elsewhere.
        """
        if self._messenger is None or self._supervisor is None:
            return
        for slot in self._supervisor.slots.values():
            self._supervisor.retire(slot.worker_id)
            self._messenger.send(CONTROLLER, Leave(worker_id=slot.worker_id, epoch=slot.epoch))
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while any(slot.is_up for slot in self._supervisor.slots.values()):
            if loop.time() > deadline_s:
                return
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End everything now, and say so."""
        if self._beating is not None:
            self._beating.cancel()
        if self._supervisor is not None:
            slots = list(self._supervisor.slots.values())
            await self._supervisor.stop(0.0)
            for slot in slots:
                self._say_gone(slot.worker_id, slot.epoch, "its host left")
        if self._messenger is not None:
            self._messenger.close()
        self._folder.remove()

    # -------------------------------------------------------------------------------- what is heard

    def _receive(self, message: Message) -> None:
        match message:
            case Ping():
                self._is_known = True
                if self._heart is not None:
                    self._heart.hear(message)
            case Admitted() | Refused():
                self._take_answer(message)
            case PeerUp(info=info):
                if self._supervisor is not None and info.host == self.admitted.name:
                    self._supervisor.joined(info.worker_id, info.epoch)
                    self.on_worker(info.worker_id)
            case Evict(worker_id=worker_id, epoch=epoch, reason=reason):
                if self._supervisor is not None:
                    _log.warning("worker %s counts as dead there: %s", worker_id, reason)
                    self._supervisor.kill(worker_id, epoch)
            case Leave(worker_id=worker_id):
                if self._supervisor is not None and worker_id in self._supervisor.slots:
                    self._supervisor.retire(worker_id)
            case _:
                _log.warning("a %s is not for a host", type(message).__name__)

    def _take_answer(self, answer: Admitted | Refused) -> None:
        """Take the first answer; later ones come from a controller that was started since."""
        if not self._answer.done():
            self._answer.set_result(answer)
        elif isinstance(answer, Refused):
            self._fail(StartupFailed(f"{self.door} lets this host in no more: {answer.reason}"))
        elif answer.name != self.admitted.name:
            self._fail(
                StartupFailed(f"another host has taken the name {self.admitted.name} meanwhile")
            )
        elif self.admitted.layout is not None and answer.layout is not None:
            refusal = answer.layout.incompatibility(self.admitted.layout)
            if refusal is not None:
                self._fail(StartupFailed(f"{self.door} serves another model now: {refusal}"))

    def _progress(self, stage: str, fraction: float) -> None:
        self.stage = (stage, fraction)
        self.on_progress(stage, fraction)

    def _loaded(self, model: ModelFacts) -> None:
        self.model = model

    def _lose(self, worker_id: WorkerId, epoch: int, reason: str) -> None:
        self._say_gone(worker_id, epoch, reason)
        if self._supervisor is not None and not self._supervisor.slots:
            self._fail(WorkersUnavailable("the cluster has let every worker of this host go"))

    def _say_gone(self, worker_id: WorkerId, epoch: int, reason: str) -> None:
        assert self._messenger is not None
        gone = Gone(worker_id=worker_id, epoch=epoch, reason=reason)
        self._messenger.send(CONTROLLER, gone)

    def _fail(self, error: Exception) -> None:
        if not self.broken.done():
            self.broken.set_result(error)
