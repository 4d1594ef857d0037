"""Looking at the cluster, and changing it while it serves: `GET /cluster`, workers started and
retired, roles switched.

Owns the form in which that is asked and answered. What a change means is the cluster's affair,
behind `Administration`; `app.py` routes to here.
"""

from typing import Final

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from penstock.core.errors import BackendUnavailable
from penstock.core.service import Administration, ClusterStatus, Service, WorkerStatus
from penstock.core.types import Role, WorkerId
from penstock.server.asgi import JSON, read_body
from penstock.server.gate import CALLER, id_header
from penstock.server.schema import decode_body

BODY_BYTES_MAX: Final = 4096
BODY_TIMEOUT_S: Final = 10.0


class WorkerView(Struct, kw_only=True):
    """A worker. `state` is up, suspected (silent for a while) or leaving. A pinned role is not
    changed by the cluster.

    `host` is "" on the server's own. `epoch` is new for every incarnation. `transports` are the
    ways by which others read its KV; `assigned` counts requests that it is to serve, the counts
    after it are what it said last. `backlog_ms` is the predicted time of the prefills it has ahead,
    `step_ms` that of a decode step with one sequence more.
    """

    id: str
    role: str
    is_pinned: bool
    host: str
    state: str
    epoch: int
    pid: int
    engine: str
    transports: list[str]
    capacity_tokens: int
    assigned: int
    backlog_ms: float = 0.0
    step_ms: float = 0.0
    waiting: int = 0
    running: int = 0
    handing_off: int = 0
    free_blocks: list[int] = []
    cached_blocks: list[int] = []
    num_blocks: list[int]


class ClusterView(Struct, kw_only=True):
    """Answer of `GET /cluster`. Requests are counted by state, and since the start.

    `regime` is normal, imbalanced or overloaded; loads are ratios to what the SLOs allow, 1 is
    full. `flips` counts workers that changed sides by themselves, `wanted_workers` would bring both
    loads to 0.8. Without a worker that could change sides nobody looks, and they stay 0.

    With `--max-workers` so many workers of the server's own host, between `workers_min` and
    `workers_max`, are started and retired as the load asks for; else all of these are 0.
    """

    workers: list[WorkerView]
    queued: int
    prefilling: int
    handing_off: int
    decoding: int
    arrived: int
    finished: int
    aborted: int
    failed: int
    retried: int
    is_draining: bool
    regime: str = "normal"
    load_prefill: float = 0.0
    load_decode: float = 0.0
    flips: int = 0
    wanted_workers: int = 0
    workers_min: int = 0
    workers_max: int = 0
    workers_started: int = 0
    workers_retired: int = 0


class StartWorkers(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /cluster/workers`: start so many more workers on the server's own host."""

    role: Role
    count: int = 1


class WorkersStarted(Struct, kw_only=True):
    """Its answer: they serve as soon as `GET /cluster` shows them."""

    started: list[str]


class WorkerLeaves(Struct, kw_only=True):
    """Answer of `DELETE /cluster/workers/{worker}`: it gets nothing new, and ends when done."""

    leaving: str


class SwitchRole(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /pd_role_switch`: `worker` has the role `new_role` from its next request on.

    Pinned, it keeps it until the next call; otherwise the cluster may change it as it sees fit.
    Without a `new_role` it keeps the one it has.
    """

    worker: str
    new_role: Role | None = None
    is_pinned: bool = True


class RoleSwitched(Struct, kw_only=True):
    """Its answer."""

    worker: str
    old_role: str
    new_role: str
    is_pinned: bool


class ClusterApi:
    """The endpoints. Without an administration they only show."""

    def __init__(self, service: Service, administration: Administration | None) -> None:
        self._service = service
        self._administration = administration
        self._start_bodies = msgspec.json.Decoder(StartWorkers)
        self._switch_bodies = msgspec.json.Decoder(SwitchRole)

    async def show(self, request: HttpRequest) -> Response:
        """Return who serves, and what they have to do."""
        return _answer(request, view(self._service.status()))

    async def start_workers(self, request: HttpRequest) -> Response:
        """Start more workers here."""
        body = decode_body(self._start_bodies, await _body_of(request))
        started = self._admin().start_workers(body.role, body.count)
        return _answer(request, WorkersStarted(started=[*started]), 202)

    async def retire_worker(self, request: HttpRequest) -> Response:
        """Let a worker finish what it has, and leave for good."""
        worker_id = WorkerId(request.path_params["worker"])
        self._admin().retire_worker(worker_id)
        return _answer(request, WorkerLeaves(leaving=worker_id), 202)

    async def switch_role(self, request: HttpRequest) -> Response:
        """Give a worker another role, while it runs."""
        body = decode_body(self._switch_bodies, await _body_of(request))
        old = self._admin().set_role(WorkerId(body.worker), body.new_role, is_pinned=body.is_pinned)
        switched = RoleSwitched(
            worker=body.worker,
            old_role=old.value,
            new_role=(body.new_role or old).value,
            is_pinned=body.is_pinned,
        )
        return _answer(request, switched)

    def _admin(self) -> Administration:
        if self._administration is None:
            raise BackendUnavailable("the workers of this server are fixed")
        return self._administration


def view(status: ClusterStatus) -> ClusterView:
    """Return a status as it is shown."""
    return ClusterView(
        workers=[_view_worker(worker) for worker in status.workers],
        queued=status.queued,
        prefilling=status.prefilling,
        handing_off=status.handing_off,
        decoding=status.decoding,
        arrived=status.arrived,
        finished=status.finished,
        aborted=status.aborted,
        failed=status.failed,
        retried=status.retried,
        is_draining=status.is_draining,
        regime=status.regime,
        load_prefill=round(status.load_prefill, 4),
        load_decode=round(status.load_decode, 4),
        flips=status.flips,
        wanted_workers=status.wanted_workers,
        workers_min=status.limits.least,
        workers_max=status.limits.most,
        workers_started=status.limits.started,
        workers_retired=status.limits.retired,
    )


def _view_worker(worker: WorkerStatus) -> WorkerView:
    info, load = worker.info, worker.load
    kinds = [region.kind for region in info.regions] + [e.kind for e in info.endpoints]
    shown = WorkerView(
        id=info.worker_id,
        role=(worker.role or info.role).value,
        is_pinned=worker.is_pinned,
        host=info.host,
        state="leaving" if worker.is_leaving else "suspected" if worker.is_suspected else "up",
        epoch=info.epoch,
        pid=info.pid,
        engine=info.engine,
        transports=list(dict.fromkeys(kinds)),
        capacity_tokens=info.capacity_tokens,
        assigned=worker.assigned,
        backlog_ms=round(worker.backlog_ms, 4),
        step_ms=round(worker.step_ms, 4),
        num_blocks=[*info.num_blocks],
    )
    if load is not None:
        shown.waiting, shown.running = load.waiting, load.running
        shown.handing_off = load.handing_off
        shown.free_blocks, shown.cached_blocks = [*load.free_blocks], [*load.cached_blocks]
    return shown


async def _body_of(request: HttpRequest) -> bytes:
    return await read_body(request.scope, request.receive, BODY_BYTES_MAX, BODY_TIMEOUT_S)


def _answer(request: HttpRequest, content: Struct, status: int = 200) -> Response:
    response = Response(msgspec.json.encode(content), status, media_type=JSON.decode())
    response.raw_headers.extend(id_header(request.scope[CALLER]))
    return response
