"""`LocalCluster`: a cluster as its controller's process sees it: the controller here, the host and
the workers of this machine in processes of their own, and those of other hosts that have joined.

It is the `Service` that the HTTP server and the Python API are given. Everything runs on the event
loop's thread.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from penstock.control.controller import Controller
from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import BadRequest, StartupFailed, UnknownWorker, WorkersUnavailable
from penstock.core.events import Configured, Drain, Event, Move, MoveDone, SetRole
from penstock.core.explain import Accuracy, Explanation
from penstock.core.links import LinksTried
from penstock.core.messages import (
    Cancel,
    Hello,
    Message,
    RequestFailed,
    Resize,
    Stop,
    Submit,
    Tokens,
)
from penstock.core.node import Node
from penstock.core.request import Request
from penstock.core.residency import KVQuery, KVSurvey, Surveyed
from penstock.core.service import ClusterStatus, Sink
from penstock.core.types import CONTROLLER, FRONT, RequestId, Role, WorkerId
from penstock.runtime.clock import LoopClock
from penstock.runtime.folder import RunFolder
from penstock.runtime.journal import open_journal
from penstock.runtime.link import Prepare
from penstock.runtime.links import LinkQuestions
from penstock.runtime.membership import Membership
from penstock.runtime.messaging import Messenger, open_network
from penstock.runtime.process import HostProcess
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.runtime.supervisor import Callbacks, Supervisor
from penstock.runtime.surveys import Surveys
from penstock.runtime.worker import CONTROLLER_EPOCH

WORKER_END_TIMEOUT_S = 2.0
WORKERS_MAX = 256
"""Workers of this host; more than any host has use for."""

_log = logging.getLogger(__name__)


class LocalCluster:
    """From `launch` to `stop`. Serves from the moment `ready` returns."""

    def __init__(self, settings: ClusterSettings, folder: RunFolder, host: HostProcess) -> None:
        self.settings = settings
        self.controller = Controller(settings.control)
        self.stage = ("starting", 0.0)
        """What the host is doing while it loads, and how much of it is done, 0 to 1."""
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self._folder = folder
        self._host = host
        self._sinks: dict[RequestId, Sink] = {}
        self._model: ModelFacts | None = None
        self._is_started = False

    @classmethod
    def launch(cls, settings: ClusterSettings, *, parent: Path | None = None) -> "LocalCluster":
        """Start the host process; needs no event loop. `parent` is for the private folder."""
        folder = RunFolder.create(parent)
        return cls(settings, folder, HostProcess.spawn(folder.path))

    async def start(self) -> None:
        """Connect with the host on this loop; it loads the model meanwhile.

        Raises: `StartupFailed` when the private folder or the decision log cannot be used.
        """
        self._ready: asyncio.Future[ModelFacts] = asyncio.get_running_loop().create_future()
        self.broken: asyncio.Future[StartupFailed] = asyncio.get_running_loop().create_future()
        """Done when the cluster can serve no more, with the reason."""
        network = self.settings.network
        self._messenger = Messenger(
            CONTROLLER,
            CONTROLLER_EPOCH,
            self._folder.path,
            self._receive,
            hears_strangers=True,
            network=open_network(network, network.port) if network else None,
            on_fenced=lambda sender, epoch: self._membership.on_fenced(sender, epoch),
        )
        self._node = Node(
            self.controller,
            clock=LoopClock(asyncio.get_running_loop()),
            transport=_FrontTransport(self._messenger, self._to_front, self._dismiss),
            log=open_journal(self.settings.decision_log),
        )
        self._node.deliver(Configured(self.controller.config))
        self._messenger.open()
        self._supervisor = Supervisor(
            Prepare(self.settings, str(self._folder.path), self._messenger.address),
            host=self._host,
            callbacks=Callbacks(
                progress=self._progress, loaded=self._loaded, lost=self._lose, failed=self._fail
            ),
        )
        self._membership = Membership(
            self._messenger, self.settings, deliver=self._deliver, kill=self._supervisor.kill
        )
        self._surveys = Surveys(self._messenger.send)
        self._links = LinkQuestions(self._messenger.send)
        self._watching = asyncio.ensure_future(self._membership.watch())
        self._supervisor.start()
        self._is_started = True

    async def ready(self) -> ModelFacts:
        """Wait until every worker is up.

        Raises: `StartupFailed` saying what to change.
        """
        return await asyncio.shield(self._ready)

    async def __aenter__(self) -> "LocalCluster":
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.stop)
            await self.start()
            await self.ready()
            stack.pop_all()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End everything now. Requests under way fail; drain before to let them finish."""
        if not self._is_started:
            self._host.abort()
            self._folder.remove()
            return
        self._is_started = False
        self.drain()
        self.abandon("the server was stopped")
        self._watching.cancel()
        for worker_id in self.controller.workers:
            self._messenger.send(worker_id, Stop())
        await asyncio.sleep(0)
        await self._supervisor.stop(WORKER_END_TIMEOUT_S)
        self._messenger.close()
        self._folder.remove()

    # ---------------------------------------------------------------------------------- the service

    @property
    def join_address(self) -> str:
        """Where other hosts join, as HOST:PORT; "" when they cannot."""
        return self._messenger.remote_address.removeprefix("tcp://")

    @property
    def num_live_requests(self) -> int:
        """Requests that have neither ended nor been cancelled."""
        return len(self._sinks)

    def submit(self, request: Request, sink: Sink) -> None:
        """Start a request.

        Raises: `WorkersUnavailable` while the model loads or the cluster drains, `CapacityExceeded`
        when too many requests are under way, `PromptTooLong` when it can never fit.
        """
        if self._model is None:
            stage, fraction = self.stage
            raise WorkersUnavailable(f"the model is loading ({stage}, {fraction:.0%})")
        if self.broken.done():
            raise WorkersUnavailable(str(self.broken.result()))
        refusal = self.controller.refusal(request)
        if refusal is not None:
            raise refusal
        assert request.request_id not in self._sinks, request.request_id
        self._sinks[request.request_id] = sink
        self._deliver(Submit(request=request))

    def cancel(self, request_id: RequestId) -> None:
        """Stop a request; its sink is not called again. An unknown id is ignored."""
        if self._sinks.pop(request_id, None) is not None:
            self._deliver(Cancel(request_id=request_id))

    def status(self) -> ClusterStatus:
        """Return the cluster as of now."""
        return self.controller.status()

    def explain(self, request_id: RequestId) -> Explanation | None:
        """Say why a request went where it went, and what came of it; None when nobody knows."""
        return self.controller.explain(request_id)

    def accuracy(self) -> Accuracy:
        """Return how good predictions were, as totals since the start."""
        return self.controller.accuracy()

    async def survey(self, query: KVQuery) -> KVSurvey:
        """Say where KV blocks are, as the workers answer within a few seconds.

        Raises: `UnknownWorker`; `UnknownRequest` when none of the requests is live.
        """
        if query.worker_id is not None:
            self._info(query.worker_id)
        return await self._surveys.survey(self.controller, query)

    async def try_links(self, worker_id: WorkerId, moved_bytes: int) -> LinksTried:
        """Have a worker try every transport to every other one, and measure them.

        Raises: `UnknownWorker`; `DeadlineExceeded` when it does not answer.
        """
        self._info(worker_id)
        return await self._links.ask(worker_id, moved_bytes, len(self.controller.workers))

    # ----------------------------------------------------------------------------- administration

    def start_workers(self, role: Role, count: int) -> tuple[WorkerId, ...]:
        """Start more workers on this host; they serve when they are up.

        Raises: `WorkersUnavailable` while the model loads, `BadRequest` for a number that is none.
        """
        if self._model is None or self.broken.done():
            raise WorkersUnavailable("the model is not loaded")
        if self._model.layout is None:
            raise WorkersUnavailable(
                "this host was started without workers and has no model: add some of other hosts "
                "with penstock worker --join, or serve with --prefill and --decode above 0"
            )
        room = WORKERS_MAX - len(self._supervisor.slots)
        if not 0 < count <= room:
            raise BadRequest(f"{count}: 1 to {room} more workers can be started here", "count")
        return tuple(self._supervisor.add(role) for _ in range(count))

    def retire_worker(self, worker_id: WorkerId) -> None:
        """Give a worker nothing new, and end it when it has finished what it has.

        Raises: `UnknownWorker`.
        """
        info = self._info(worker_id)
        if worker_id in self._supervisor.slots:
            self._supervisor.retire(worker_id)
        self._membership.retire(worker_id, info.epoch)

    def set_role(self, worker_id: WorkerId, role: Role | None, *, is_pinned: bool) -> Role:
        """Change a worker's role from its next request on (None: keep it); return the old one.

        Raises: `UnknownWorker`.
        """
        self._info(worker_id)
        old = self.controller.workers[worker_id].role
        self._deliver(SetRole(worker_id=worker_id, role=role, is_pinned=is_pinned))
        return old

    def _info(self, worker_id: WorkerId) -> WorkerInfo:
        record = self.controller.workers.get(worker_id)
        if record is None:
            up = ", ".join(sorted(self.controller.workers)) or "none"
            raise UnknownWorker(f"there is no worker {worker_id}; up are: {up}", "worker")
        return record.info

    def drain(self) -> None:
        """Take no new request from now on."""
        self._deliver(Drain())

    def abandon(self, reason: str) -> None:
        """Fail every request that is under way."""
        for request_id, sink in list(self._sinks.items()):
            if self.broken.done():
                del self._sinks[request_id]  # there is nobody left to tell
            else:
                self.cancel(request_id)
            sink(RequestFailed(request_id=request_id, reason=reason))

    # ------------------------------------------------------------------------------- what comes in

    def _deliver(self, event: Event) -> None:
        """Hand an event to the controller. A bug in there ends the cluster: its books are not to be
        trusted any more.
        """
        is_handled = False
        try:
            self._node.deliver(event)
            is_handled = True
        finally:
            if not is_handled:
                self._fail(StartupFailed("the controller failed: this is a bug in Penstock"))

    def _receive(self, message: Message) -> None:
        if isinstance(message, Hello):
            if not self._membership.welcome(message):
                return
            self._deliver(message)
            self._supervisor.joined(message.info.worker_id, message.info.epoch)
            self._note_ready()
        elif isinstance(message, Surveyed):
            self._surveys.take(message)
        elif isinstance(message, LinksTried):
            self._links.take(message)
        elif not self._membership.receive(message):
            self._deliver(message)

    def _note_ready(self) -> None:
        if self._supervisor.is_complete and not self._ready.done():
            assert self._model is not None
            self._ready.set_result(self._model)

    def _dismiss(self, worker_id: WorkerId) -> None:
        """The controller lets a worker go: it is to end for good, whoever started it."""
        self._membership.dismiss(worker_id)

    def _to_front(self, message: Message) -> None:
        """Pass on what the controller has for the clients."""
        match message:
            case Tokens(outputs=outputs):
                for output in outputs:
                    is_last = output.finish_reason is not None
                    sinks = self._sinks
                    sink = (sinks.pop if is_last else sinks.get)(output.request_id, None)
                    if sink is not None:
                        sink(output)
            case RequestFailed(request_id=request_id):
                sink = self._sinks.pop(request_id, None)
                if sink is not None:
                    sink(message)
            case Resize():
                self._resize(message)
            case _:
                raise AssertionError(f"a {type(message).__name__} is not for the front")

    def _resize(self, change: Resize) -> None:
        """Start and retire workers as the controller asks, as far as there is room."""
        slots, most = self._supervisor.slots, self.settings.control.workers_max
        for role in change.start[: max(0, most - len(slots))]:
            name = self._supervisor.add(role)
            _log.info("worker %s is started (%s): %s", name, _of(len(slots), most), change.reason)
        if change.retire in slots:
            left = _of(len(slots) - 1, most)
            _log.info("worker %s is retired (%s): %s", change.retire, left, change.reason)
            self.retire_worker(change.retire)

    def _progress(self, stage: str, fraction: float) -> None:
        self.stage = (stage, fraction)
        self.on_progress(stage, fraction)

    def _loaded(self, model: ModelFacts) -> None:
        self._model = model
        self._membership.loaded(model)
        self._note_ready()

    def _lose(self, worker_id: WorkerId, epoch: int, reason: str) -> None:
        self._membership.lose(worker_id, epoch, reason)

    def _fail(self, error: StartupFailed) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            # Whoever waits gets it; if nobody does, `broken` tells.
            self._ready.exception()
        if not self.broken.done():
            self.broken.set_result(error)
        self.abandon(str(error))


def _of(num_workers: int, most: int) -> str:
    return f"{num_workers} of at most {most} here"


class _FrontTransport:
    """The transport port of the controller: workers by messages, the front by a call. `dismiss`
    hears of every worker that is told to stop.
    """

    def __init__(
        self,
        messenger: Messenger,
        to_front: Callable[[Message], None],
        dismiss: Callable[[WorkerId], None],
    ) -> None:
        self._messenger = messenger
        self._to_front = to_front
        self._dismiss = dismiss

    def send(self, to: WorkerId, message: Message) -> None:
        if to == FRONT:
            self._to_front(message)
            return
        self._messenger.send(to, message)
        if isinstance(message, Stop) and not message.reason:
            self._dismiss(to)

    def submit(self, move: Move, _done: Callable[[MoveDone], None]) -> None:
        raise AssertionError(f"the controller has no blocks to move: {move}")
