"""`Membership`: who takes part in the cluster, as the controller's process sees it.

Owns the other hosts that were let in, and the watch over every worker, local or not: both sides say
at an interval that they are alive. Who is silent is suspected, then counts as dead; so does a
worker whose step does not end. What is lost with a worker is the controller's affair, ending its
process the supervisor's here and the other host's there. Called by `LocalCluster`, on its loop.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from penstock.core.block import KVLayout
from penstock.core.events import Event, Retire, WorkerLost, WorkerSuspected
from penstock.core.membership import Admitted, Evict, Gone, Join, Leave, Ping, Refused
from penstock.core.messages import Hello, Message, PeerUp
from penstock.core.types import CONTROLLER, NS_PER_S, WorkerId
from penstock.core.version import VERSION
from penstock.runtime.messaging import Messenger
from penstock.runtime.protocol import machine_id, protocol_digest
from penstock.runtime.settings import ClusterSettings, ModelFacts

HOST_EPOCH: Final = 1
"""Hosts have a new id at every start instead of a new epoch."""
_NOT_IN_NAMES: Final = re.compile("[^a-z0-9.]+")
_NAME_CHARACTERS_MAX: Final = 20

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Member:
    """One incarnation of a worker, or another host. Times are by the loop's clock."""

    epoch: int
    since_s: float
    host: str = ""
    num_returns: int = 0
    is_suspected: bool = False
    ping: Ping | None = None
    ping_ns: int = 0

    def take(self, ping: Ping) -> None:
        self.ping, self.ping_ns = ping, time.monotonic_ns()


@dataclass(kw_only=True)
class _Host(_Member):
    name: str
    worker_ids: set[WorkerId] = field(default_factory=set)


class Membership:
    """`deliver` takes events to the controller; `kill` ends the process of a local worker."""

    def __init__(
        self,
        messenger: Messenger,
        settings: ClusterSettings,
        *,
        deliver: Callable[[Event], None],
        kill: Callable[[WorkerId, int], None],
    ) -> None:
        self._messenger = messenger
        self._settings = settings
        self._deliver = deliver
        self._kill = kill
        self._model: ModelFacts | None = None
        self._layout: KVLayout | None = None
        self._workers: dict[WorkerId, _Member] = {}
        self._hosts: dict[WorkerId, _Host] = {}
        self._last_epochs: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._excused_s = self._loop.time()

    def loaded(self, model: ModelFacts) -> None:
        """Let others in from now on."""
        self._model = model
        self._layout = model.layout

    # ------------------------------------------------------------------------------ what comes in

    def receive(self, message: Message) -> bool:
        """Handle a message that is about membership; False when it is not."""
        match message:
            case Ping(sender=sender, epoch=epoch):
                member = self._workers.get(sender) or self._hosts.get(sender)
                if member is not None and member.epoch == epoch:
                    member.take(message)
            case Join():
                self._admit(message)
            case Leave(worker_id=worker_id, epoch=epoch):
                self._deliver(Retire(worker_id, epoch))
            case Gone(worker_id=worker_id, epoch=epoch, reason=reason):
                self.lose(worker_id, epoch, reason)
            case _:
                return False
        return True

    def welcome(self, hello: Hello) -> bool:
        """Take a worker in; False when the controller need not hear of it.

        The same incarnation may say hello again: it had lost us while we still knew it. What it had
        is gone, and so it must come back as another one.
        """
        info = hello.info
        if self._model is None and info.host:
            return False  # it asks again
        known = self._workers.get(info.worker_id)
        if known is not None and known.epoch >= info.epoch:
            if known.epoch == info.epoch and known.num_returns != hello.num_returns:
                self._evict(info.worker_id, known, "it had lost its controller")
            return False
        if known is not None:
            self.lose(info.worker_id, known.epoch, "another incarnation took its place")
        self._layout = self._layout or info.layout
        route = self._messenger.route(info.address, info.remote_address)
        self._messenger.connect(info.worker_id, info.epoch, route)
        self._workers[info.worker_id] = _Member(
            epoch=info.epoch,
            since_s=self._loop.time(),
            host=info.host,
            num_returns=hello.num_returns,
        )
        self._last_epochs[info.host] = max(info.epoch, self._last_epochs.get(info.host, 0))
        self._tell_host(info.host, PeerUp(info=info))
        if info.host:
            _log.info("worker %s of host %s has joined", info.worker_id, info.host)
        return True

    def lose(self, worker_id: WorkerId, epoch: int, reason: str) -> None:
        """Take note that an incarnation is gone, however that became known."""
        member = self._workers.get(worker_id)
        if member is not None and member.epoch == epoch:
            del self._workers[worker_id]
            if member.host:
                _log.info("worker %s of host %s is gone: %s", worker_id, member.host, reason)
        self._messenger.forget(worker_id, epoch)
        self._deliver(WorkerLost(worker_id=worker_id, epoch=epoch, reason=reason))

    def retire(self, worker_id: WorkerId, epoch: int) -> None:
        """Have a worker finish what it has and leave for good."""
        self._deliver(Retire(worker_id, epoch))
        member = self._workers.get(worker_id)
        if member is not None and member.host:
            self._tell_host(member.host, Leave(worker_id=worker_id, epoch=epoch))

    def dismiss(self, worker_id: WorkerId) -> None:
        """Watch a worker no more: it was told to leave."""
        member = self._workers.pop(worker_id, None)
        if member is not None and member.host:
            _log.info("worker %s of host %s has left", worker_id, member.host)

    def on_fenced(self, worker_id: WorkerId, epoch: int) -> None:
        """Deal with one that counts as dead and speaks: it stood still, or its link was cut."""
        host = next((h for h in self._hosts.values() if worker_id in h.worker_ids), None)
        if host is not None:
            self._tell_host(host.name, Evict(worker_id=worker_id, epoch=epoch, reason="silent"))

    # --------------------------------------------------------------------------------- other hosts

    def _admit(self, join: Join) -> None:
        """Answer a host that wants to join; one that asks again gets the same answer again."""
        self._messenger.connect(join.host, HOST_EPOCH, join.address)
        host = self._hosts.get(join.host)
        if (join.version, join.protocol) != (VERSION, protocol_digest()):
            reason = (
                f"this host has Penstock {join.version} (messages {join.protocol}), the cluster "
                f"{VERSION} (messages {protocol_digest()}): install the same version on both"
            )
            self._messenger.send(join.host, Refused(reason=reason))
            return
        if host is None:
            name = self._free_name(join.name)
            host = _Host(epoch=HOST_EPOCH, since_s=self._loop.time(), name=name)
            self._hosts[join.host] = host
            _log.info("host %s asks to join from %s", name, join.address)
        if self._model is None:
            self._messenger.send(join.host, self._ping(host))  # it knows that we heard it
            return
        engine = self._settings.engine
        if self._layout is not None:
            engine = replace(engine, dtype=self._layout.dtype)
        admitted = Admitted(
            name=host.name,
            epoch=max(int(time.time()), self._last_epochs.get(host.name, 0)),
            engine=engine,
            executor=self._settings.executor,
            layout=self._layout,
            machine=machine_id(),
            echo_ns=join.sent_ns,
            now_ns=time.monotonic_ns(),
        )
        self._messenger.send(join.host, admitted)

    def _free_name(self, wanted: str) -> str:
        """Return a name for a host that no other one has; the one it had before, if it can be."""
        stem = _NOT_IN_NAMES.sub("", wanted.lower())[:_NAME_CHARACTERS_MAX] or "host"
        taken = {host.name for host in self._hosts.values()}
        names = [stem, *(f"{stem}.{number}" for number in range(2, len(taken) + 2))]
        return next(name for name in names if name not in taken)

    def _tell_host(self, name: str, message: Message) -> None:
        for host_id, host in self._hosts.items():
            if host.name == name:
                if isinstance(message, PeerUp):
                    host.worker_ids.add(message.info.worker_id)
                self._messenger.send(host_id, message)

    # ----------------------------------------------------------------------------------- the watch

    async def watch(self) -> None:
        """Speak to all members, and judge their silence, until cancelled."""
        pulse = self._settings.pulse
        while True:
            slept_s = self._loop.time()
            await asyncio.sleep(pulse.interval_s)
            now_s = self._loop.time()
            if now_s - slept_s > pulse.suspect_after_s:
                # It is we who stood still: what they said meanwhile is about to be read.
                self._excused_s = now_s
            for worker_id, member in list(self._workers.items()):
                self._messenger.send(worker_id, self._ping(member))
                self._judge(worker_id, member, now_s)
            for host_id, host in list(self._hosts.items()):
                self._messenger.send(host_id, self._ping(host))
                if self._silence_s(host_id, host, now_s) >= pulse.lost_after_s:
                    _log.warning("host %s is gone: silent", host.name)
                    self._messenger.forget(host_id, HOST_EPOCH)
                    del self._hosts[host_id]

    def _judge(self, worker_id: WorkerId, member: _Member, now_s: float) -> None:
        pulse = self._settings.pulse
        silence_s = self._silence_s(worker_id, member, now_s)
        step_s = member.ping.step_age_ns / NS_PER_S if member.ping is not None else 0.0
        if silence_s >= pulse.lost_after_s:
            self._evict(worker_id, member, f"silent for {silence_s:.1f} s")
        elif step_s >= pulse.step_timeout_s:
            self._evict(worker_id, member, f"stuck in a step for {step_s:.1f} s")
        elif (silence_s >= pulse.suspect_after_s) != member.is_suspected:
            member.is_suspected = not member.is_suspected
            word = "is silent" if member.is_suspected else "is heard again"
            _log.warning("worker %s %s", worker_id, word)
            self._deliver(
                WorkerSuspected(
                    worker_id=worker_id, epoch=member.epoch, is_suspected=member.is_suspected
                )
            )

    def _silence_s(self, name: WorkerId, member: _Member, now_s: float) -> float:
        epoch, heard_s = self._messenger.heard_s.get(name, (member.epoch, member.since_s))
        if epoch != member.epoch:
            heard_s = member.since_s
        return now_s - max(heard_s, member.since_s, self._excused_s)

    def _ping(self, member: _Member) -> Ping:
        now_ns = time.monotonic_ns()
        echo_ns = member.ping.sent_ns if member.ping is not None else 0
        return Ping(
            sender=CONTROLLER,
            epoch=self._messenger.epoch,
            sent_ns=now_ns,
            echo_ns=echo_ns,
            held_ns=now_ns - member.ping_ns,
        )

    def _evict(self, worker_id: WorkerId, member: _Member, reason: str) -> None:
        """Count a worker as dead, and have its process ended, whatever that is doing."""
        _log.warning("worker %s counts as dead: %s", worker_id, reason)
        self.lose(worker_id, member.epoch, reason)
        if member.host:
            evict = Evict(worker_id=worker_id, epoch=member.epoch, reason=reason)
            self._tell_host(member.host, evict)
        else:
            self._kill(worker_id, member.epoch)
