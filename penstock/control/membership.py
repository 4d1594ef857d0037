"""Who belongs to the cluster: workers that join, fall silent, leave or die, and what the others are
told of it.

Functions over a `Fleet`. What becomes of the requests that a worker had is the controller's, their
only caller.
"""

from collections.abc import Iterable

from penstock.control.fleet import Fleet
from penstock.control.record import RequestRecord, WorkerRecord
from penstock.core.events import Command, Retire, Send, SetRole, WorkerLost, WorkerSuspected
from penstock.core.messages import Hello, PeerDown, PeerUp, Stop, TellNames
from penstock.core.types import Role, WorkerId


def welcome(fleet: Fleet, hello: Hello) -> list[Command]:
    """Introduce a new worker and the others to each other, or turn it away.

    One that has had another controller before has a cache, of which this one must hear.
    """
    info = hello.info
    peers = list(fleet)
    refusal = info.layout.incompatibility(peers[0].info.layout) if peers else None
    if refusal is not None:
        return [Send(info.worker_id, Stop(reason=refusal))]
    fleet.join(info)
    commands: list[Command] = []
    for peer in peers:
        commands.append(Send(peer.info.worker_id, PeerUp(info=info)))
        commands.append(Send(info.worker_id, PeerUp(info=peer.info)))
    if hello.num_returns:
        commands.append(Send(info.worker_id, TellNames()))
    return commands


def lose(fleet: Fleet, event: WorkerLost) -> tuple[WorkerRecord | None, list[Command]]:
    """Forget a dead worker and tell the others; None when it was another incarnation."""
    worker = _incarnation(fleet, event.worker_id, event.epoch)
    return (None, []) if worker is None else (worker, _forget(fleet, worker))


def suspect(fleet: Fleet, event: WorkerSuspected) -> None:
    """Give a silent worker nothing while there is another, until it is heard again."""
    worker = _incarnation(fleet, event.worker_id, event.epoch)
    if worker is not None:
        worker.is_suspected = event.is_suspected
        fleet.reopen()


def retire(fleet: Fleet, event: Retire) -> None:
    """Give a worker nothing new any more."""
    worker = _incarnation(fleet, event.worker_id, event.epoch)
    if worker is not None:
        worker.is_leaving = True
        fleet.reopen()


def dismiss(fleet: Fleet, requests: Iterable[RequestRecord]) -> list[Command]:
    """Let those that are leaving go when no request needs them. O(live requests) for each."""
    records = list(requests)
    commands: list[Command] = []
    for worker in fleet.leaving:
        if not any(record.needs(worker) for record in records):
            commands.append(Send(worker.info.worker_id, Stop()))
            commands += _forget(fleet, worker)
    return commands


def set_role(fleet: Fleet, event: SetRole) -> None:
    """Give a worker another label, from the next assignment on. It keeps all it has."""
    worker = fleet.workers.get(event.worker_id)
    if worker is not None:
        worker.role = event.role or worker.role
        worker.is_pinned = event.is_pinned
        fleet.reopen()


def relabel(fleet: Fleet, flips: Iterable[tuple[WorkerRecord, Role]]) -> bool:
    """Have workers change sides; tell whether any did."""
    changed = list(flips)
    for worker, role in changed:
        worker.role = role
    if changed:
        fleet.reopen()
    return bool(changed)


def _incarnation(fleet: Fleet, worker_id: WorkerId, epoch: int) -> WorkerRecord | None:
    worker = fleet.workers.get(worker_id)
    return worker if worker is not None and worker.info.epoch == epoch else None


def _forget(fleet: Fleet, worker: WorkerRecord) -> list[Command]:
    fleet.leave(worker)
    down = PeerDown(worker_id=worker.info.worker_id, epoch=worker.info.epoch)
    return [Send(other, down) for other in fleet.workers]
