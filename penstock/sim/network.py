"""`SimNetwork`: messages with delay and moves with a duration, between nodes that may die.

Messages between two nodes keep their order, as over one socket. A dead node neither says nor hears
anything; what was on its way to it is swallowed. A move copies real bytes between the simulated
workers' pools, at the time at which it lands, so that a block given away too early is caught with
the wrong content.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.events import Message, Move, MoveDone
from penstock.core.types import WorkerId
from penstock.sim.clock import SimClock
from penstock.sim.executor import Pool

Deliver = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class LinkCost:
    """A message takes `latency_ns` and up to `jitter_ns` more; a move `latency_ns + spans * span_ns
    + bytes / rate`.
    """

    latency_ns: int = 50_000
    jitter_ns: int = 0
    span_ns: int = 2_000
    bytes_per_s: int = 10_000_000_000


class SimNetwork:
    """All links of a simulated cluster."""

    def __init__(self, clock: SimClock, cost: LinkCost, rng: random.Random) -> None:
        self.clock = clock
        self.cost = cost
        self.rng = rng
        self._nodes: dict[WorkerId, tuple[int, Deliver]] = {}
        self._pools: dict[tuple[WorkerId, int], tuple[Pool, ...]] = {}
        self._last_ns: dict[tuple[WorkerId, WorkerId], int] = {}
        self._num_incarnations = 0

    def join(self, node: WorkerId, deliver: Deliver) -> int:
        """Connect a node; return a key that `leave` asks for, so that a successor of the same name
        is not hit.
        """
        self._num_incarnations += 1
        self._nodes[node] = (self._num_incarnations, deliver)
        return self._num_incarnations

    def register(self, worker: WorkerId, epoch: int, pools: tuple[Pool, ...]) -> None:
        """Make a worker's pools readable by its peers."""
        self._pools[worker, epoch] = pools

    def leave(self, node: WorkerId, epoch: int) -> None:
        """Cut a node off, with its memory."""
        self._nodes.pop(node, None)
        self._pools.pop((node, epoch), None)

    def send(self, sender: WorkerId, to: WorkerId, message: Message) -> None:
        """Deliver after the link's delay, unless the receiver is gone or replaced by then."""
        receiver = self._nodes.get(to)
        if receiver is None:
            return
        delay_ns = self.cost.latency_ns + self.rng.randint(0, self.cost.jitter_ns)
        at_ns = max(self.clock.now_ns() + delay_ns, self._last_ns.get((sender, to), 0))
        self._last_ns[sender, to] = at_ns

        def arrive() -> None:
            if self._nodes.get(to) == receiver:
                receiver[1](message)

        self.clock.call_at(at_ns, arrive)

    def submit(
        self,
        own: tuple[Pool, ...],
        move: Move,
        is_alive: Callable[[], bool],
        done: Callable[[MoveDone], None],
    ) -> None:
        """Copy the move's spans into `own` when its time is over; fail when the source is gone by
        then.
        """
        started_ns = self.clock.now_ns()
        num_spans = sum(map(len, move.spans))
        num_bytes = sum(
            span.num_blocks * pool[0].nbytes
            for spans, pool in zip(move.spans, own, strict=True)
            for span in spans
        )
        duration_ns = (
            self.cost.latency_ns
            + num_spans * self.cost.span_ns
            + num_bytes * 1_000_000_000 // self.cost.bytes_per_s
        )

        def land() -> None:
            if not is_alive():
                return
            source = self._pools.get((move.source, move.epoch))
            error = None if source is not None else f"{move.source} is gone"
            if source is not None:
                _copy(source, own, move)
            done(
                MoveDone(
                    move_id=move.move_id,
                    num_bytes=num_bytes,
                    num_spans=num_spans,
                    transport="sim",
                    started_ns=started_ns,
                    finished_ns=self.clock.now_ns(),
                    error=error,
                )
            )

        self.clock.call_at(started_ns + duration_ns, land)


class SimTransport:
    """The transport port of one simulated node."""

    def __init__(
        self,
        network: SimNetwork,
        node: WorkerId,
        pools: tuple[Pool, ...] = (),
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._network = network
        self._node = node
        self._pools = pools
        self._is_alive = is_alive

    def send(self, to: WorkerId, message: Message) -> None:
        """Say something, if still alive."""
        if self._is_alive():
            self._network.send(self._node, to, message)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Pull blocks."""
        self._network.submit(self._pools, move, self._is_alive, done)


def _copy(source: tuple[Pool, ...], destination: tuple[Pool, ...], move: Move) -> None:
    for group, spans in enumerate(move.spans):
        for span in spans:
            start, end = span.destination, span.destination + span.num_blocks
            destination[group][start:end] = source[group][
                span.source : span.source + span.num_blocks
            ]
