"""`Traffic`: every move of a worker waits here for its link, whoever asked for it.

The desks plan moves; `kv/dma.py` decides which goes next on each link: hand-off before onboard
before prefetch before offload before relocation, the earliest deadline first, each class sure of
its share. A move was coalesced when it was planned, so one move is one transfer. What waits can be
cancelled or promoted; what has begun is let finish.

Links are what moves compete for: out of each tier into the pool, from the pool into each tier, from
a tier to those below it, and one for all that stays between pools, peers' and our own. The latter
takes as many at once as there are peers, since one that is silent must hold up nobody else. What a
sibling has in a tier lies in the same memory as ours, and crosses on the same link.

Called by the worker core, which passes everything that its desks submit by here.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Move, MoveClass, MoveDone, SubmitMove
from penstock.core.types import NS_PER_S
from penstock.kv.dma import Descriptor, DmaScheduler, Transfer, TransferState
from penstock.kv.tiers import Link, LinkSpec, Tier

POOLS: Final[Link] = (Tier.HBM, Tier.HBM)
POOLS_AT_ONCE: Final = 64
"""Moves between pools, peers' and ours, under way at the same time."""
POOLS_BYTES_PER_NS: Final = 5.0
"""What a move between pools is expected to do until one has been measured."""


class Traffic:
    """The queues of a worker's links, and what is under way on them."""

    def __init__(self, config: WorkerConfig) -> None:
        self.dma = DmaScheduler(_links(config))
        self._config = config
        self._waiting: dict[int, tuple[Transfer, SubmitMove]] = {}
        self._moving: dict[int, Descriptor] = {}
        self._next_address = 0

    def pass_on(self, commands: Iterable[Command], now_ns: int) -> list[Command]:
        """Queue the moves among commands; return those that begin now, then all other commands."""
        others: list[Command] = []
        for command in commands:
            if isinstance(command, SubmitMove):
                self._submit(command)
            else:
                others.append(command)
        return self._start(now_ns) + others if self._waiting else others

    def land(self, done: MoveDone, now_ns: int) -> None:
        """Note that a move has ended: its link is free, and its rate is known."""
        descriptor = self._moving.pop(done.move_id)
        self.dma.finish(descriptor, now_ns)
        took_ns = done.finished_ns - done.started_ns
        if done.error is None and took_ns > 0:
            self.dma.measure(descriptor.link.ends, descriptor.num_bytes, took_ns)

    def cancel(self, move_id: int) -> bool:
        """Take a move back that has not begun; False when it has."""
        if move_id not in self._waiting:
            return False
        transfer, _ = self._waiting.pop(move_id)
        return self.dma.cancel(transfer)

    def promote(self, move_id: int, kind: MoveClass, deadline_ns: int) -> bool:
        """Make a move more urgent that has not begun; False when it has."""
        if move_id not in self._waiting:
            return False
        transfer, _ = self._waiting[move_id]
        return self.dma.promote(transfer, kind, deadline_ns)

    def predict_ns(self, link: Link, kind: MoveClass, num_bytes: int) -> float:
        """Predict when a move of this class would have landed, were it submitted now."""
        return self.dma.ahead_ns(link, kind) + self.dma.alone_ns(link, num_bytes)

    def expose(self, link: Link, waited_ns: int) -> None:
        """Book that computation stood still for a move on this link."""
        self.dma.expose(link, waited_ns)

    def check(self) -> None:
        """Assert that what waits here waits there."""
        self.dma.check()
        for transfer, command in self._waiting.values():
            assert transfer.state is TransferState.WAITING, command

    def _submit(self, command: SubmitMove) -> None:
        move = command.move
        num_bytes = max(1, _num_bytes(move, self._config))  # a move may have nothing to copy
        transfer = Transfer(
            key=move.move_id,
            kind=move.kind,
            link=_link(move),
            num_bytes=num_bytes,
            deadline_ns=command.deadline_ns,
            source_address=self._next_address,
        )
        self._next_address += num_bytes + 1  # never adjacent: a move is whole already
        self._waiting[move.move_id] = transfer, command
        self.dma.submit(transfer)

    def _start(self, now_ns: int) -> list[Command]:
        started: list[Command] = []
        for descriptor in self.dma.start(now_ns):
            (transfer,) = descriptor.transfers
            move_id = transfer.key
            assert isinstance(move_id, int), move_id
            _, command = self._waiting.pop(move_id)
            self._moving[move_id] = descriptor
            started.append(command)
        return started


def _link(move: Move) -> Link:
    if move.tiers is None:
        return POOLS
    source, destination = move.tiers.source, move.tiers.destination
    return Tier(source) if source else Tier.HBM, Tier(destination) if destination else Tier.HBM


def _links(config: WorkerConfig) -> list[LinkSpec]:
    """Return what this worker's moves compete for, at the rates that are to be expected."""
    pools = LinkSpec(
        source=Tier.HBM,
        destination=Tier.HBM,
        latency_ns=0,
        bytes_per_ns=POOLS_BYTES_PER_NS,
        num_queues=POOLS_AT_ONCE,
    )
    links = [pools]
    for tier in config.tiers:
        rate = tier.bytes_per_s
        links.append(_tier_link(Tier(tier.name), Tier.HBM, tier.latency_ns, rate))
        links.append(_tier_link(Tier.HBM, Tier(tier.name), tier.latency_ns, rate))
    for upper, lower in combinations(config.tiers, 2):
        rate = min(upper.bytes_per_s, lower.bytes_per_s)
        latency_ns = max(upper.latency_ns, lower.latency_ns)
        links.append(_tier_link(Tier(upper.name), Tier(lower.name), latency_ns, rate))
    return links


def _tier_link(source: Tier, destination: Tier, latency_ns: int, bytes_per_s: int) -> LinkSpec:
    return LinkSpec(
        source=source,
        destination=destination,
        latency_ns=latency_ns,
        bytes_per_ns=bytes_per_s / NS_PER_S,
    )


def _num_bytes(move: Move, config: WorkerConfig) -> int:
    """Return the bytes that a move copies, as they are in the pool."""
    sizes = config.layout.block_bytes
    blocks = sum(
        span.num_blocks * size
        for spans, size in zip(move.spans, sizes, strict=False)
        for span in spans
    )
    tokens = sum(
        (reshape.end - reshape.begin) * size // config.layout.block_size
        for reshape, size in zip(move.reshapes, sizes, strict=False)
    )
    return blocks + tokens
