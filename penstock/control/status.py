"""The cluster as people are told of it."""

from collections.abc import Mapping

from penstock.control.fleet import Fleet
from penstock.control.record import RequestRecord
from penstock.control.roles import Roles
from penstock.control.sizing import Sizing
from penstock.core.request import RequestState
from penstock.core.service import ClusterStatus, WorkerStatus
from penstock.core.types import NS_PER_MS, RequestId


def status_of(
    fleet: Fleet,
    requests: Mapping[RequestId, RequestRecord],
    roles: Roles,
    sizing: Sizing,
    *,
    is_draining: bool,
    totals: Mapping[str, int],
) -> ClusterStatus:
    """Return the cluster as of now. O(workers + requests)."""
    states = [record.state for record in requests.values()]
    return ClusterStatus(
        workers=tuple(
            WorkerStatus(
                info=w.info,
                assigned=w.num_requests,
                load=w.load,
                is_leaving=w.is_leaving,
                is_suspected=w.is_suspected,
                role=w.role,
                is_pinned=w.is_pinned,
                backlog_ms=w.backlog_ns / NS_PER_MS,
                step_ms=float(fleet.step[w.slot]) / NS_PER_MS,
                num_decodes=w.num_decodes,
            )
            for w in fleet
        ),
        queued=states.count(RequestState.QUEUED),
        prefilling=states.count(RequestState.PREFILLING),
        handing_off=states.count(RequestState.HANDING_OFF),
        decoding=states.count(RequestState.DECODING),
        is_draining=is_draining,
        regime=roles.loads.regime.value,
        load_prefill=roles.loads.prefill,
        load_decode=roles.loads.decode,
        flips=roles.num_flips,
        wanted_workers=roles.wanted_workers(),
        limits=sizing.limits,
        **totals,
    )
