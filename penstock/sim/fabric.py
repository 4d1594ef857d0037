"""`Fabric`: the transport of a performance simulation, where moves take time and carry no bytes.

Workers sit on hosts. A move between two hosts leaves through the one's network card and enters
through the other's, and shares both with every other move there; between workers of one host it
takes that host's inner link. A move takes

    latency + spans * span + bytes / (fair share of the links)

Messages take the latency and are never lost: what goes wrong on the way is tested over
`penstock/sim/network.py`, where blocks hold real bytes.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from penstock.core.events import Move, MoveClass, MoveDone
from penstock.core.messages import Message, Tokens
from penstock.core.types import CONTROLLER, FRONT, NS_PER_S, WorkerId
from penstock.sim.clock import SimClock
from penstock.sim.links import Link, SharedLinks
from penstock.sim.stretches import Stretches

Deliver = Callable[[Message], None]
FIRST_TOKENS: Final = "FirstTokens"
"""Tokens with the first of a request among them. A worker has more to say and to start just then,
so they take longer; drawn from those of all tokens, first ones would come too early, and the mean
time between tokens would be too long.
"""
OWN_BYTES_PER_S: Final = 1e12
"""Copies within one worker's memory, which is read and written for them."""


@dataclass(frozen=True, slots=True, eq=False)
class MessageTimes:
    """How long messages were under way, by kind (`kind_of`), in order of time."""

    seen_ns: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricCost:
    """What connects hosts (`card`, each way) and the workers of one host (`inner`, shared).

    A message takes the latency. With `messages` it takes a time drawn from those of its kind, and
    what is for the front, in the controller's process, one drawn from `front_ns`, or none.
    """

    latency_ns: int = 20_000
    span_ns: int = 5_000
    card_bytes_per_s: float = 25e9
    inner_bytes_per_s: float = 300e9
    messages: MessageTimes | None = None
    front_ns: tuple[int, ...] = ()


class Fabric:
    """All links of a simulated cluster; nodes join and leave."""

    def __init__(
        self, clock: SimClock, cost: FabricCost, host_of: dict[WorkerId, int], *, seed: int = 0
    ) -> None:
        self.clock = clock
        self.cost = cost
        self.num_messages = 0
        self._host_of = host_of
        self._nodes: dict[WorkerId, tuple[int, Deliver]] = {}
        self._rng = random.Random(seed)
        self._draws: dict[tuple[WorkerId, WorkerId, str], Stretches[int]] = {}
        self._last_ns: dict[tuple[WorkerId, WorkerId], int] = {}
        self.links = SharedLinks(clock, _capacities(set(host_of.values()), cost))

    def join(self, node: WorkerId, epoch: int, deliver: Deliver) -> None:
        """Connect a node; one that is there already is replaced."""
        self._nodes[node] = (epoch, deliver)

    def leave(self, node: WorkerId) -> None:
        """Cut a node off; what is on its way to it is swallowed."""
        self._nodes.pop(node, None)

    def send(self, to: WorkerId, message: Message, sender: WorkerId = CONTROLLER) -> None:
        """Deliver when the message's time is over, unless the receiver is gone or replaced by then.

        Messages between two nodes arrive in order.
        """
        receiver = self._nodes.get(to)
        if receiver is None:
            return
        self.num_messages += 1

        def arrive() -> None:
            if self._nodes.get(to) is receiver:
                receiver[1](message)

        self.clock.call_at(self._arrives_ns(sender, to, message), arrive)

    def _arrives_ns(self, sender: WorkerId, to: WorkerId, message: Message) -> int:
        now_ns, cost = self.clock.now_ns(), self.cost
        if cost.messages is None:
            return now_ns + cost.latency_ns
        kind = kind_of(message)
        draws = self._draws.get((sender, to, kind))
        if draws is None:
            at_front = cost.front_ns or (0,)
            usual = (cost.latency_ns,)
            seen = at_front if to == FRONT else cost.messages.seen_ns.get(kind) or usual
            draws = self._draws[sender, to, kind] = Stretches(seen, self._rng)
        at_ns = now_ns + draws.draw()
        at_ns = self._last_ns[sender, to] = max(at_ns, self._last_ns.get((sender, to), 0))
        return at_ns

    def submit(
        self,
        reader: WorkerId,
        block_bytes: tuple[int, ...],
        move: Move,
        done: Callable[[MoveDone], None],
    ) -> None:
        """Carry a move's bytes; it fails when the other side is gone, or another, at its end.

        What has a destination is written there (push), all else is read. A comparison of what is
        there already reads its own memory.
        """
        peer = move.destination or move.source
        is_own = peer == reader or move.kind is MoveClass.VERIFY
        started_ns = self.clock.now_ns()
        num_spans = sum(map(len, move.spans))
        num_bytes = sum(
            span.num_blocks * size
            for spans, size in zip(move.spans, block_bytes, strict=True)
            for span in spans
        )

        def land() -> None:
            node = self._nodes.get(peer)
            is_there = node is not None and node[0] == move.epoch
            is_there |= move.kind is MoveClass.VERIFY
            done(
                MoveDone(
                    move_id=move.move_id,
                    num_bytes=num_bytes,
                    num_spans=num_spans,
                    transport="sim",
                    started_ns=started_ns,
                    finished_ns=self.clock.now_ns(),
                    error=None if is_there else f"{peer} is gone",
                )
            )

        begins_ns = started_ns + self.cost.latency_ns + num_spans * self.cost.span_ns
        if is_own:  # within its own memory: nobody else's link is used
            self.clock.call_at(begins_ns + int(num_bytes / OWN_BYTES_PER_S * NS_PER_S), land)
            return
        links = self._way(reader, peer) if move.destination else self._way(peer, reader)
        if num_bytes:
            self.clock.call_at(begins_ns, lambda: self.links.carry(links, num_bytes, land))
        else:
            self.clock.call_at(begins_ns, land)

    def _way(self, source: WorkerId, reader: WorkerId) -> tuple[Link, ...]:
        here, there = self._host_of[reader], self._host_of[source]
        return (("inner", here),) if here == there else (("out", there), ("in", here))


class ControllerPort:
    """The transport port of the controller: it sends, and moves nothing."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def send(self, to: WorkerId, message: Message) -> None:
        """Say something."""
        self._fabric.send(to, message)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Refuse. Raises: `AssertionError`, since a controller has no blocks."""
        raise AssertionError(f"the controller has no blocks to move: {move}")


def kind_of(message: Message) -> str:
    """Return the name of a message's class, or `FIRST_TOKENS`."""
    is_first = isinstance(message, Tokens) and any(output.timeline for output in message.outputs)
    return FIRST_TOKENS if is_first else type(message).__name__


def _capacities(hosts: set[int], cost: FabricCost) -> dict[Link, float]:
    capacities: dict[Link, float] = {}
    for host in sorted(hosts):
        capacities["out", host] = capacities["in", host] = cost.card_bytes_per_s
        capacities["inner", host] = cost.inner_bytes_per_s
    return capacities
