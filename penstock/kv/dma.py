"""DMA scheduler: which transfer goes next on each link.

A queue per link. Classes in order hand-off, onboard, prefetch, offload, relocate; the earliest
deadline first within a class. So that a lower class does not starve, it earns a share of every byte
that others are given while it waits, and goes first when it has earned its head. Waiting transfers
of the same class that are adjacent at both ends of a link ride in one descriptor and pay its
latency once.

A transfer waits, moves, and is gone; it can be cancelled or promoted while it waits, not after.
Links are fed with at most `num_queues` descriptors at a time, so that what is urgent overtakes what
waits here and not in hardware; of several queues, one is kept free of prefetches and offloads.

Busy time (somebody used the link) and exposed time (computation waited for it) are booked apart:
the first is free as long as the second is zero. It knows no block beyond its key and moves nothing:
`kv/orchestrator.py` and `worker/traffic.py` submit, and ask for descriptors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from typing import Final

from msgspec.structs import replace

from penstock.core.events import MoveClass
from penstock.kv.tiers import BlockKey, Link, LinkSpec, Tier

CLASSES: Final = tuple(MoveClass)
"""Most urgent first."""
IDLE_ONLY: Final = (MoveClass.PREFETCH, MoveClass.OFFLOAD, MoveClass.RELOCATE)
"""Classes for which nobody waits at this moment."""
SHARES: Final[Mapping[MoveClass, float]] = {
    MoveClass.HANDOFF: 0.0,
    MoveClass.ONBOARD: 0.2,
    MoveClass.PREFETCH: 0.05,
    MoveClass.OFFLOAD: 0.05,
    MoveClass.RELOCATE: 0.05,
}
"""What each class is sure of, whatever more urgent classes ask for."""
RATE_WEIGHT: Final = 0.2
"""Weight of the latest descriptor in a link's measured rate, at least: the first count alike, and
as much as what was expected.
"""
DESCRIPTOR_BYTES_MAX: Final = 1 << 20
"""Adjacent blocks ride together up to here: a longer descriptor keeps urgent ones waiting."""


class TransferState(Enum):
    """WAITING -> MOVING -> DONE; WAITING -> CANCELLED."""

    WAITING = "waiting"
    MOVING = "moving"
    DONE = "done"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Transfer:
    """One block's copy from tier to tier. `destination_address` None: anywhere."""

    key: BlockKey
    kind: MoveClass
    link: Link
    num_bytes: int
    deadline_ns: int
    source_address: int
    destination_address: int | None = None
    state: TransferState = TransferState.WAITING
    is_riding: bool = False
    """It had a neighbour waiting when it came, and is likely to share that one's latency."""

    @property
    def destination(self) -> Tier:
        """The tier that is written."""
        return self.link[1]


@dataclass(frozen=True, slots=True, eq=False)
class Descriptor:
    """Adjacent transfers that cross as one; `num_bytes` is their sum."""

    descriptor_id: int
    link: LinkSpec
    kind: MoveClass
    transfers: tuple[Transfer, ...]
    num_bytes: int
    started_ns: int


@dataclass(slots=True)
class LinkBooks:
    """What happened on one link. `late` counts transfers that landed after their deadline."""

    busy_ns: int = 0
    exposed_ns: int = 0
    num_descriptors: int = 0
    num_transfers: int = 0
    num_cancelled: int = 0
    num_promoted: int = 0
    num_late: int = 0
    num_bytes: dict[MoveClass, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))


class _Queue:
    """What waits on one link, and what it has earned."""

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self.books = LinkBooks()
        self.heaps: dict[MoveClass, list[tuple[int, int, Transfer]]] = {c: [] for c in CLASSES}
        self.num_waiting = dict.fromkeys(CLASSES, 0)
        self.waiting_bytes = dict.fromkeys(CLASSES, 0)
        self.num_latencies = dict.fromkeys(CLASSES, 0)
        self.earned_bytes = dict.fromkeys(CLASSES, 0.0)
        self.by_start: dict[int, Transfer] = {}
        self.by_end: dict[int, Transfer] = {}
        self.moving: dict[int, Descriptor] = {}
        self.busy_since_ns = 0
        self.num_measured = 0


class DmaScheduler:
    """Queues of all links; O(log waiting) for each transfer."""

    def __init__(
        self,
        links: Iterable[LinkSpec],
        *,
        shares: Mapping[MoveClass, float] = SHARES,
        descriptor_bytes_max: int = DESCRIPTOR_BYTES_MAX,
    ) -> None:
        assert sum(shares.values()) < 1, f"shares {shares} leave nothing to the most urgent"
        self._queues = {spec.ends: _Queue(spec) for spec in links}
        self._shares = shares
        self._descriptor_bytes_max = descriptor_bytes_max
        self._num_submitted = 0
        self._num_started = 0

    @property
    def links(self) -> list[LinkSpec]:
        """All links."""
        return [queue.spec for queue in self._queues.values()]

    def has_link(self, link: Link) -> bool:
        """Tell whether two tiers are connected."""
        return link in self._queues

    def books(self, link: Link) -> LinkBooks:
        """Return what happened on a link so far."""
        return self._queues[link].books

    def num_waiting(self, link: Link, kind: MoveClass) -> int:
        """Return how many transfers of a class wait."""
        return self._queues[link].num_waiting[kind]

    # ------------------------------------------------------------------------------ what waits

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer."""
        assert transfer.state is TransferState.WAITING, transfer
        queue = self._queues[transfer.link]
        transfer.is_riding = self.would_ride(transfer)
        self._push(queue, transfer)
        # Two copies from one address are two transfers; the second is nobody's neighbour.
        queue.by_start.setdefault(transfer.source_address, transfer)
        queue.by_end.setdefault(transfer.source_address + transfer.num_bytes, transfer)

    def would_ride(self, transfer: Transfer) -> bool:
        """Tell whether a transfer has a neighbour among those that wait."""
        queue = self._queues[transfer.link]
        after = queue.by_start.get(transfer.source_address + transfer.num_bytes)
        before = queue.by_end.get(transfer.source_address)
        return (after is not None and _is_adjacent(transfer, after)) or (
            before is not None and _is_adjacent(before, transfer)
        )

    def cancel(self, transfer: Transfer) -> bool:
        """Take a waiting transfer back; False when it moves already or is gone."""
        if transfer.state is not TransferState.WAITING:
            return False
        queue = self._queues[transfer.link]
        self._take(queue, transfer, TransferState.CANCELLED)
        queue.books.num_cancelled += 1
        return True

    def promote(self, transfer: Transfer, kind: MoveClass, deadline_ns: int) -> bool:
        """Make a waiting transfer more urgent; False when there is nothing to change any more.

        Neither class nor deadline ever becomes less urgent by this.
        """
        if transfer.state is not TransferState.WAITING:
            return False
        kind = min(kind, transfer.kind, key=CLASSES.index)
        deadline_ns = min(deadline_ns, transfer.deadline_ns)
        if (kind, deadline_ns) == (transfer.kind, transfer.deadline_ns):
            return False
        queue = self._queues[transfer.link]
        _count(queue, transfer, -1)
        transfer.kind, transfer.deadline_ns = kind, deadline_ns
        self._push(queue, transfer)
        queue.books.num_promoted += 1
        return True

    def _push(self, queue: _Queue, transfer: Transfer) -> None:
        self._num_submitted += 1
        item = (transfer.deadline_ns, self._num_submitted, transfer)
        heappush(queue.heaps[transfer.kind], item)
        _count(queue, transfer, 1)

    def _take(self, queue: _Queue, transfer: Transfer, state: TransferState) -> None:
        transfer.state = state
        _count(queue, transfer, -1)
        if not queue.num_waiting[transfer.kind]:
            queue.earned_bytes[transfer.kind] = 0.0
        start, end = transfer.source_address, transfer.source_address + transfer.num_bytes
        if queue.by_start.get(start) is transfer:
            del queue.by_start[start]
        if queue.by_end.get(end) is transfer:
            del queue.by_end[end]

    # ------------------------------------------------------------------------------ what moves

    def start(self, now_ns: int) -> list[Descriptor]:
        """Return what is to be started now, on all links that have a queue free."""
        started = []
        for queue in self._queues.values():
            while len(queue.moving) < queue.spec.num_queues:
                head = self._head(queue)
                if head is None:
                    break
                started.append(self._descriptor(queue, head, now_ns))
        return started

    def finish(self, descriptor: Descriptor, now_ns: int) -> None:
        """Note that a descriptor has landed, or failed: either way its queue is free."""
        queue = self._queues[descriptor.link.ends]
        del queue.moving[descriptor.descriptor_id]
        books = queue.books
        for transfer in descriptor.transfers:
            transfer.state = TransferState.DONE
            books.num_late += now_ns > transfer.deadline_ns
        books.num_bytes[descriptor.kind] += descriptor.num_bytes
        books.num_descriptors += 1
        books.num_transfers += len(descriptor.transfers)
        if not queue.moving:
            books.busy_ns += now_ns - queue.busy_since_ns

    def _head(self, queue: _Queue) -> Transfer | None:
        """Return what goes first: who has earned it, else the most urgent class."""
        idle_only = [d for d in queue.moving.values() if d.kind in IDLE_ONLY]
        is_kept = queue.spec.num_queues > 1 and len(idle_only) >= queue.spec.num_queues - 1
        kinds = [kind for kind in CLASSES if not (is_kept and kind in IDLE_ONLY)]
        heads = [head for kind in kinds if (head := _peek(queue, kind))]
        for head in heads[1:]:
            if queue.earned_bytes[head.kind] >= head.num_bytes:
                return head
        return heads[0] if heads else None

    def _descriptor(self, queue: _Queue, head: Transfer, now_ns: int) -> Descriptor:
        transfers = self._neighbours(queue, head)
        for transfer in transfers:
            self._take(queue, transfer, TransferState.MOVING)
        num_bytes = sum(transfer.num_bytes for transfer in transfers)
        for kind in CLASSES:
            if kind is not head.kind and queue.num_waiting[kind]:
                queue.earned_bytes[kind] += self._shares.get(kind, 0.0) * num_bytes
        spent = queue.earned_bytes[head.kind] - num_bytes
        queue.earned_bytes[head.kind] = max(0.0, spent)
        if not queue.moving:
            queue.busy_since_ns = now_ns
        self._num_started += 1
        descriptor = Descriptor(
            self._num_started, queue.spec, head.kind, tuple(transfers), num_bytes, now_ns
        )
        queue.moving[descriptor.descriptor_id] = descriptor
        return descriptor

    def _neighbours(self, queue: _Queue, head: Transfer) -> list[Transfer]:
        """Return the run of waiting transfers around `head`, in order of address."""
        room = self._descriptor_bytes_max - head.num_bytes
        run = [head]
        while (after := queue.by_start.get(run[-1].source_address + run[-1].num_bytes)) is not None:
            if after.num_bytes > room or not _is_adjacent(run[-1], after):
                break
            room -= after.num_bytes
            run.append(after)
        before: list[Transfer] = []
        first = head
        while (earlier := queue.by_end.get(first.source_address)) is not None:
            if earlier.num_bytes > room or not _is_adjacent(earlier, first):
                break
            room -= earlier.num_bytes
            before.append(earlier)
            first = earlier
        return before[::-1] + run

    # ------------------------------------------------------------------------------ accounting

    def expose(self, link: Link, waited_ns: int) -> None:
        """Book that computation stood still for so long because of this link."""
        self._queues[link].books.exposed_ns += waited_ns

    def measure(self, link: Link, num_bytes: int, took_ns: int) -> None:
        """Note what a descriptor really took: costs are predicted by the mean, the latest most."""
        queue = self._queues[link]
        queue.num_measured += 1
        weight = max(RATE_WEIGHT, 1 / (1 + queue.num_measured))
        before = 1 / queue.spec.bytes_per_ns
        found = max(1.0, took_ns - queue.spec.latency_ns) / num_bytes
        queue.spec = replace(queue.spec, bytes_per_ns=1 / (before + weight * (found - before)))

    def alone_ns(self, link: Link, num_bytes: int) -> float:
        """Predict how long one descriptor takes on an idle link."""
        return self._queues[link].spec.duration_ns(num_bytes)

    def ahead_ns(self, link: Link, kind: MoveClass) -> float:
        """Predict how long a new transfer of this class would wait for what is before it.

        What moves counts in full; latencies are shared by those that ride together.
        """
        queue = self._queues[link]
        num_bytes = sum(descriptor.num_bytes for descriptor in queue.moving.values())
        num_latencies = len(queue.moving)
        for other in CLASSES[: CLASSES.index(kind) + 1]:
            num_latencies += queue.num_latencies[other]
            num_bytes += queue.waiting_bytes[other]
        spec = queue.spec
        return spec.bytes_ns(num_bytes) + spec.latency_ns * num_latencies / spec.num_queues

    def predict_ns(self, transfer: Transfer) -> float:
        """Predict when a transfer would have landed, counted from now, if it were submitted."""
        spec = self._queues[transfer.link].spec
        latency_ns = 0.0 if self.would_ride(transfer) else spec.latency_ns
        ahead_ns = self.ahead_ns(transfer.link, transfer.kind)
        return ahead_ns + latency_ns + spec.bytes_ns(transfer.num_bytes)

    def check(self) -> None:
        """Assert that the counts are those of the queues and that no link is overfed."""
        for link, queue in self._queues.items():
            assert len(queue.moving) <= queue.spec.num_queues, link
            counts = queue.num_waiting, queue.waiting_bytes, queue.num_latencies
            booked = zip(*(count.values() for count in counts), strict=True)
            for (kind, heap), found in zip(queue.heaps.items(), booked, strict=True):
                assert found == (_tally(heap, kind) if heap else (0, 0, 0)), (link, kind)
            for start, transfer in queue.by_start.items():
                assert transfer.source_address == start
                assert transfer.state is TransferState.WAITING


def _count(queue: _Queue, transfer: Transfer, sign: int) -> None:
    """Book a transfer as waiting (1) or no longer (-1)."""
    queue.num_waiting[transfer.kind] += sign
    queue.waiting_bytes[transfer.kind] += sign * transfer.num_bytes
    queue.num_latencies[transfer.kind] += sign * (not transfer.is_riding)


def _tally(heap: list[tuple[int, int, Transfer]], kind: MoveClass) -> tuple[int, int, int]:
    """Return how many of a class wait, their bytes, and how many pay a latency."""
    waiting = {id(t): t for _, _, t in heap if _waits(t, kind)}.values()
    num_bytes = sum(t.num_bytes for t in waiting)
    return len(waiting), num_bytes, sum(not t.is_riding for t in waiting)


def _waits(transfer: Transfer, kind: MoveClass) -> bool:
    return transfer.state is TransferState.WAITING and transfer.kind is kind


def _peek(queue: _Queue, kind: MoveClass) -> Transfer | None:
    """Return the earliest of a class; drop what was cancelled, taken or promoted from the heap."""
    heap = queue.heaps[kind]
    while heap:
        deadline_ns, _, transfer = heap[0]
        if _waits(transfer, kind) and transfer.deadline_ns == deadline_ns:
            return transfer
        heappop(heap)
    return None


def _is_adjacent(first: Transfer, second: Transfer) -> bool:
    """Tell whether `second` follows `first` at the destination too, in the same class."""
    if first.kind is not second.kind:
        return False
    if first.destination_address is None or second.destination_address is None:
        return first.destination_address is second.destination_address
    return first.destination_address + first.num_bytes == second.destination_address
