"""`SimNetwork`: messages with delay and moves with a duration, between nodes that may die.

Messages between two nodes keep their order, as over one socket. A dead node neither says nor hears
anything; what was on its way to it is swallowed. A move copies real bytes between the simulated
workers' pools, at the time at which it lands, so that a block given away too early is caught with
the wrong content.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penstock.core.block import KVLayout
from penstock.core.events import Move, MoveClass, MoveDone, Reshape
from penstock.core.messages import Message
from penstock.core.types import CONTROLLER, FRONT, BlockId, Digest, WorkerId
from penstock.kv.pool import Generations
from penstock.sim.clock import SimClock
from penstock.sim.tiers import SimTiers
from penstock.transfer.digest import disagree, is_corrupt, take_digests
from penstock.transfer.generation import is_stale
from penstock.transfer.region import Bytes2D
from penstock.transfer.reshape import cut_staged, plan_reshape, whole_blocks

Deliver = Callable[[Message], None]


@dataclass(frozen=True, slots=True, eq=False)
class SimMemory:
    """A worker's pools, in what shape its KV lies there, and how often blocks were handed out;
    `tiers` are below the pool.
    """

    layout: KVLayout
    pools: tuple[Bytes2D, ...]
    generations: tuple[Generations, ...]
    tiers: SimTiers | None = None

    def digests_of(self, pool: Bytes2D, wanted: Reshape) -> tuple[Digest, ...]:
        """Return the digests of what a reshape has filled, if it came with digests itself."""
        whole = whole_blocks(wanted, self.layout.block_size) if wanted.source.digests else ()
        return take_digests(pool, whole)


@dataclass(frozen=True, slots=True)
class LinkCost:
    """A message takes `latency_ns` and up to `jitter_ns` more; a move `latency_ns + spans * span_ns
    + bytes / rate`.

    The rest is what goes wrong between workers, as probabilities: a message is lost, comes twice,
    or is overtaken by later ones for up to `late_ns`; a move fails, or lands with a flipped bit.
    What the controller says and hears is never lost: that link breaks as a whole, with the worker.
    """

    latency_ns: int = 50_000
    jitter_ns: int = 0
    span_ns: int = 2_000
    bytes_per_s: int = 10_000_000_000
    loss: float = 0.0
    duplication: float = 0.0
    lateness: float = 0.0
    late_ns: int = 0
    move_failure: float = 0.0
    corruption: float = 0.0


class SimNetwork:
    """All links of a simulated cluster."""

    def __init__(self, clock: SimClock, cost: LinkCost, rng: random.Random) -> None:
        self.clock = clock
        self.cost = cost
        self.rng = rng
        self._nodes: dict[WorkerId, tuple[int, Deliver]] = {}
        self._memories: dict[tuple[WorkerId, int], SimMemory] = {}
        self._last_ns: dict[tuple[WorkerId, WorkerId], int] = {}
        self._num_incarnations = 0

    def join(self, node: WorkerId, deliver: Deliver) -> int:
        """Connect a node; return a key that `leave` asks for, so that a successor of the same name
        is not hit.
        """
        self._num_incarnations += 1
        self._nodes[node] = (self._num_incarnations, deliver)
        return self._num_incarnations

    def register(self, worker: WorkerId, epoch: int, memory: SimMemory) -> None:
        """Make a worker's memory readable by its peers."""
        self._memories[worker, epoch] = memory

    def tiers_of(self, worker: WorkerId, epoch: int) -> SimTiers | None:
        """Return what is below the pool of an incarnation, while it lives."""
        memory = self._memories.get((worker, epoch))
        return memory.tiers if memory else None

    def leave(self, node: WorkerId, epoch: int) -> None:
        """Cut a node off, with its memory."""
        self._nodes.pop(node, None)
        self._memories.pop((node, epoch), None)

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

        is_between_workers = not {sender, to} & {CONTROLLER, FRONT}
        for copy_at_ns in self._misfortunes(at_ns) if is_between_workers else [at_ns]:
            self.clock.call_at(copy_at_ns, arrive)

    def _misfortunes(self, at_ns: int) -> list[int]:
        """Return when a message arrives: never, once or twice, in time or late."""
        cost, rng = self.cost, self.rng
        copies = 1 + (rng.random() < cost.duplication) if rng.random() >= cost.loss else 0
        return [
            at_ns + (rng.randint(0, cost.late_ns) if rng.random() < cost.lateness else 0)
            for _ in range(copies)
        ]

    def submit(
        self,
        own: SimMemory,
        move: Move,
        is_alive: Callable[[], bool],
        done: Callable[[MoveDone], None],
    ) -> None:
        """Carry the move out when its time is over; fail when the peer is gone by then."""
        started_ns = self.clock.now_ns()
        num_spans = sum(map(len, move.spans)) + sum(r.end > 0 for r in move.reshapes)
        num_bytes = _num_bytes(own, move)
        duration_ns = (
            self.cost.latency_ns
            + num_spans * self.cost.span_ns
            + num_bytes * 1_000_000_000 // self.cost.bytes_per_s
        )

        def land() -> None:
            if not is_alive():
                return
            name = move.destination or move.source
            is_own = move.kind in (MoveClass.VERIFY, MoveClass.RELOCATE)
            peer = own if is_own else self._memories.get((name, move.epoch))
            error = None
            is_wrong = is_too_late = False
            if peer is None or self.rng.random() < self.cost.move_failure:
                error = f"{name} is gone"
            elif not move.reshapes and peer.layout != own.layout:
                error = f"{name} keeps blocks of another layout"
            else:
                # Links flip bits; what stays within a worker's own memory crosses none.
                is_sent = num_bytes > 0 and not is_own
                is_flipped = is_sent and self.rng.random() < self.cost.corruption
                rng = self.rng if is_flipped else None
                if move.destination is not None:
                    _copy(own, peer, move, rng)
                else:
                    is_wrong = (_reshape if move.reshapes else _copy)(peer, own, move, rng)
                    is_too_late = _is_stale(move, peer.generations)
                if is_too_late:
                    error = f"{move.source} had handed out a block anew"
            done(
                MoveDone(
                    move_id=move.move_id,
                    num_bytes=num_bytes,
                    num_spans=num_spans,
                    transport="sim",
                    started_ns=started_ns,
                    finished_ns=self.clock.now_ns(),
                    error=error,
                    is_corrupt=error is None and is_wrong,
                    is_stale=is_too_late,
                    digests=tuple(map(own.digests_of, own.pools, move.reshapes)),
                )
            )

        self.clock.call_at(started_ns + duration_ns, land)


class SimTransport:
    """The transport port of one simulated node."""

    def __init__(
        self,
        network: SimNetwork,
        node: WorkerId,
        memory: SimMemory | None = None,
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._network = network
        self._node = node
        self._memory = memory
        self._is_alive = is_alive

    def send(self, to: WorkerId, message: Message) -> None:
        """Say something, if still alive."""
        if self._is_alive():
            self._network.send(self._node, to, message)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Pull blocks, or move them between the pool and a tier."""
        assert self._memory is not None, f"{self._node} has nowhere to put blocks"
        if move.tiers is not None:
            assert self._memory.tiers is not None, f"{self._node} has no tiers"
            self._memory.tiers.submit(
                self._memory.pools[0],
                move,
                self._is_alive,
                done,
                owner=lambda: self._network.tiers_of(move.source, move.epoch),
            )
            return
        self._network.submit(self._memory, move, self._is_alive, done)


def _num_bytes(own: SimMemory, move: Move) -> int:
    blocks = sum(
        span.num_blocks * size
        for spans, size in zip(move.spans, own.layout.block_bytes, strict=False)
        for span in spans
    )
    reshaped = zip(move.reshapes, own.layout.block_bytes, strict=False)
    tokens = sum((r.end - r.begin) * size // own.layout.block_size for r, size in reshaped)
    return blocks + tokens


def _is_stale(move: Move, generations: tuple[Generations, ...]) -> bool:
    for counter, reshape in zip(generations, move.reshapes, strict=False):
        if is_stale(counter[list(reshape.source.block_ids)], reshape.source.generations):
            return True
    for counter, spans, offered in zip(generations, move.spans, move.generations, strict=False):
        read = [span.source + offset for span in spans for offset in range(span.num_blocks)]
        if is_stale(counter[read], offered):
            return True
    return False


def _copy(source: SimMemory, own: SimMemory, move: Move, rng: random.Random | None) -> bool:
    """Copy spans, with a bit flipped if there is an `rng`; tell whether a digest shows it."""
    for ours, theirs, spans in zip(own.pools, source.pools, move.spans, strict=True):
        for span in spans:
            start, end = span.destination, span.destination + span.num_blocks
            ours[start:end] = theirs[span.source : span.source + span.num_blocks]
    if rng is not None:
        group = rng.choice([g for g, spans in enumerate(move.spans) if spans])
        span = rng.choice(move.spans[group])
        own.pools[group][span.destination + rng.randrange(span.num_blocks), 0] ^= np.uint8(1)
    return is_corrupt(move, own.pools)


def _reshape(source: SimMemory, own: SimMemory, move: Move, rng: random.Random | None) -> bool:
    """Do the same for tokens between shapes, as `transport/reshape.py` does it."""
    flipped = rng.choice([g for g, r in enumerate(move.reshapes) if r.end]) if rng else None
    for group, (ours, theirs) in enumerate(zip(own.pools, source.pools, strict=True)):
        plan = plan_reshape(source.layout, own.layout, group, move.reshapes[group])
        staged = theirs[plan.source_ids]
        if rng is not None and group == flipped:
            staged[rng.randrange(len(staged)), 0] ^= np.uint8(1)
        if disagree(staged, map(BlockId, range(len(staged))), plan.digests):
            return True
        if plan.is_direct:
            ours[plan.direct_ids] = staged
        cut_staged(plan, staged, ours, plan.pieces)
    return False
