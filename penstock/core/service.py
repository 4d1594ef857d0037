"""The seam between the cluster and whoever serves people: what a front end may ask of it, and what
it is told.

The HTTP server and the Python API see nothing of the cluster but this protocol.
"""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from penstock.core.descriptors import WorkerInfo
from penstock.core.explain import Accuracy, Explanation
from penstock.core.links import LinksTried
from penstock.core.messages import Load, RequestFailed, TokenOutput
from penstock.core.request import Request
from penstock.core.residency import KVQuery, KVSurvey
from penstock.core.types import RequestId, Role, WorkerId

Sink = Callable[[TokenOutput | RequestFailed], None]
"""Called on the event loop's thread with every piece of one request; the last one has a finish
reason or is a failure.
"""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """A worker as the controller sees it. `load` is None until its first report.

    One that is leaving gets nothing new; one that is suspected has been silent for a while. `role`
    is the label it has now, which may not be the one it came with. `backlog_ms` is the predicted
    time of the prefills it has ahead, `step_ms` that of a decode step with one sequence more,
    `num_decodes` are the sequences that decode there or are to.
    """

    info: WorkerInfo
    assigned: int
    load: Load | None = None
    is_leaving: bool = False
    is_suspected: bool = False
    role: Role | None = None
    is_pinned: bool = False
    backlog_ms: float = 0.0
    step_ms: float = 0.0
    num_decodes: int = 0


class WorkerLimits(Struct, frozen=True, kw_only=True):
    """How many workers of the server's own host there may be; `most` is 0 where none is started or
    retired by itself. Counts of those that were.
    """

    least: int = 0
    most: int = 0
    started: int = 0
    retired: int = 0


class ClusterStatus(Struct, frozen=True, kw_only=True):
    """Workers in order of joining, and requests by state. Totals count since the start.

    Loads are ratios to what the SLOs allow, `regime` is what they mean (`control/roles.py`);
    `flips` is how often a worker has changed sides by itself, `wanted_workers` how many it would
    take to be at ease.
    """

    workers: tuple[WorkerStatus, ...]
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
    limits: WorkerLimits = WorkerLimits()

    @property
    def is_ready(self) -> bool:
        """True when a new request could be served from beginning to end."""
        return bool(self.workers) and not self.is_draining


class Service(Protocol):
    """A running cluster. All calls are made on the event loop's thread and return at once."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Start a request.

        Raises: `CapacityExceeded` when every queue is full, `WorkersUnavailable` when nobody can
        serve it, `PromptTooLong` when it can never fit.
        """

    def cancel(self, request_id: RequestId) -> None:
        """Stop a request; its sink is not called again. An unknown id is ignored."""

    def status(self) -> ClusterStatus:
        """Return the cluster as of now."""

    def explain(self, request_id: RequestId) -> Explanation | None:
        """Say why a request went where it went, and what came of it; None when nobody knows."""

    def accuracy(self) -> Accuracy:
        """Return how good predictions were, as totals since the start."""


class KVDirectory(Protocol):
    """A cluster that can say where its KV blocks are. Calls are made on the event loop's thread;
    they ask the workers and wait for their answers, a few seconds at most.
    """

    async def survey(self, query: KVQuery) -> KVSurvey:
        """Say where blocks are.

        Raises: `UnknownWorker`; `UnknownRequest` when none of the requests is live.
        """


class LinkTester(Protocol):
    """A cluster whose workers can say what the links between them are worth. Calls are made on the
    event loop's thread; they wait for the worker, which measures.
    """

    async def try_links(self, worker_id: WorkerId, moved_bytes: int) -> LinksTried:
        """Have a worker try every transport to every other one, and measure them.

        Raises: `UnknownWorker`; `DeadlineExceeded` when it does not answer.
        """


class Administration(Protocol):
    """A cluster whose workers can be changed while it serves. Calls are as those of `Service`."""

    def start_workers(self, role: Role, count: int) -> tuple[WorkerId, ...]:
        """Start more workers on this host; they serve when they are up.

        Raises: `WorkersUnavailable` while the model loads, `BadRequest` for a number that is none.
        """

    def retire_worker(self, worker_id: WorkerId) -> None:
        """Give a worker nothing new, and end it when it has finished what it has.

        Raises: `UnknownWorker`.
        """

    def set_role(self, worker_id: WorkerId, role: Role | None, *, is_pinned: bool) -> Role:
        """Change a worker's role from its next request on (None: keep it); return the old one.

        Raises: `UnknownWorker`.
        """
