"""Copies in flight: how one block's copy is begun, encoded, sent, decoded, finished, or given up.

The mechanics under `kv/orchestrator.py`, its only caller, which decides what goes where: residency,
DMA scheduler, compression engine and the eviction orders are kept in step here, so that room, holds
and queues cannot disagree. A copy into the *target* tier is stored raw and decoded on arrival; a
copy into any other tier is stored in the codec in which it crosses.
"""

from dataclasses import dataclass
from typing import Protocol

from penstock.core.events import MoveClass
from penstock.kv.compression import CompressionEngine, Direction, Job
from penstock.kv.dma import Descriptor, DmaScheduler, Transfer
from penstock.kv.eviction import EvictionOrder
from penstock.kv.residency import Copy, Residency
from penstock.kv.tiers import RAW, BlockKey, CodecSpec, Tier


class Places(Protocol):
    """Who knows where in a tier a block can lie."""

    def place(self, key: BlockKey, tier: Tier, num_bytes: int) -> int:
        """Return the byte offset for a copy that is about to arrive."""

    def vacate(self, tier: Tier, address: int, num_bytes: int) -> None:
        """Take the room of a copy back."""


@dataclass(slots=True, eq=False)
class Flight:
    """A block on its way: which way, and when its bytes had crossed."""

    transfer: Transfer
    codec: CodecSpec
    landed_ns: int | None = None

    @property
    def key(self) -> BlockKey:
        """The block."""
        return self.transfer.key

    @property
    def source(self) -> Tier:
        """The tier that is read."""
        return self.transfer.link[0]

    @property
    def destination(self) -> Tier:
        """The tier that is written."""
        return self.transfer.link[1]


class Flights:
    """All copies that are being made, and the parts of the orchestrator that they involve."""

    def __init__(
        self,
        *,
        target: Tier,
        codecs: dict[str, CodecSpec],
        residency: Residency,
        dma: DmaScheduler,
        compression: CompressionEngine,
        orders: dict[Tier, EvictionOrder],
        places: Places,
    ) -> None:
        self._target = target
        self._codecs = codecs
        self._residency = residency
        self._dma = dma
        self._compression = compression
        self._orders = orders
        self._places = places
        self._flights: dict[tuple[BlockKey, Tier], Flight] = {}

    def find(self, key: BlockKey, tier: Tier) -> Flight | None:
        """Return the flight of a block into a tier."""
        return self._flights.get((key, tier))

    def store(self, key: BlockKey, tier: Tier, codec: str, worth: float) -> bool:
        """Note a copy that is there already; False when there is no room for it."""
        spec = self._codecs[codec]
        if spec.block_bytes > self._residency.free_bytes(tier):
            return False
        address = self._places.place(key, tier, spec.block_bytes)
        self._residency.add(key, tier, spec, address)
        self._orders[tier].insert(key, worth)
        return True

    def drop(self, key: BlockKey, tier: Tier, *, is_evicted: bool = False) -> None:
        """Give a present copy up."""
        copy = self._copy(key, tier)
        self._orders[tier].remove(key, evicted=is_evicted)
        self._places.vacate(tier, copy.address, copy.num_bytes)
        self._residency.drop(key, tier)

    def send(
        self, key: BlockKey, source: Copy, destination: Tier, kind: MoveClass, deadline_ns: int
    ) -> Flight:
        """Copy a block between tiers in the codec of `source`; there must be room."""
        return self.send_as(key, source, destination, self._codecs[source.codec], kind, deadline_ns)

    def send_as(
        self,
        key: BlockKey,
        source: Copy,
        destination: Tier,
        codec: CodecSpec,
        kind: MoveClass,
        deadline_ns: int,
    ) -> Flight:
        """Copy a block between tiers; it crosses in `codec`, encoded before if it must be."""
        is_target = destination is self._target
        stored = self._codecs[RAW] if is_target else codec
        address = self._places.place(key, destination, stored.block_bytes)
        is_begun = self._residency.begin(key, destination, stored, address)
        assert is_begun, f"no room was made for {key!r} in {destination}"
        self._residency.hold(key, source.tier)
        transfer = Transfer(
            key=key,
            kind=kind,
            link=(source.tier, destination),
            num_bytes=codec.block_bytes,
            deadline_ns=deadline_ns,
            source_address=source.address,
            # Staging takes blocks anywhere, so only the source decides what can ride together.
            destination_address=None if is_target else address,
        )
        flight = self._flights[key, destination] = Flight(transfer, codec)
        if source.codec != codec.name and codec.encode_ns:
            self._submit(flight, Direction.ENCODE)
        else:
            self._dma.submit(transfer)
        return flight

    def landed(
        self, descriptor: Descriptor, now_ns: int, *, is_failed: bool
    ) -> tuple[list[Flight], list[Flight]]:
        """Note that a descriptor has crossed; return the flights that ended well, and badly."""
        self._dma.finish(descriptor, now_ns)
        arrived, failed = [], []
        for transfer in descriptor.transfers:
            flight = self._flights[transfer.key, transfer.destination]
            self._residency.release(flight.key, flight.source)
            if is_failed:
                self._abort(flight)
                failed.append(flight)
                continue
            flight.landed_ns = now_ns
            if flight.destination is self._target and flight.codec.decode_ns:
                self._submit(flight, Direction.DECODE)
            else:
                arrived.append(flight)
        return arrived, failed

    def worked(self, job: Job, now_ns: int) -> Flight | None:
        """Note that a lane is done; return the flight that ends with this, if one does."""
        self._compression.finish(job, now_ns)
        flight = self._flights[job.key, job.tier]
        if job.direction is Direction.DECODE:
            return flight
        self._dma.submit(flight.transfer)
        return None

    def arrive(self, flight: Flight, worth: float) -> None:
        """End a flight: the copy can be read and evicted from now on."""
        del self._flights[flight.key, flight.destination]
        self._residency.finish(flight.key, flight.destination)
        self._orders[flight.destination].insert(flight.key, worth)

    def cancel(self, flight: Flight) -> bool:
        """Undo a flight that has not begun to move; False when it has."""
        if not self._dma.cancel(flight.transfer):
            return False
        self._residency.release(flight.key, flight.source)
        self._abort(flight)
        return True

    def check(self) -> None:
        """Assert that what flies has room taken and has not arrived."""
        for (key, tier), flight in self._flights.items():
            copy = self._copy(key, tier)
            assert not copy.is_present, (key, tier, flight.transfer.state)

    def _submit(self, flight: Flight, direction: Direction) -> None:
        kind, deadline_ns = flight.transfer.kind, flight.transfer.deadline_ns
        self._compression.submit(
            Job(flight.key, flight.destination, flight.codec, direction, kind, deadline_ns)
        )

    def _abort(self, flight: Flight) -> None:
        copy = self._copy(flight.key, flight.destination)
        self._places.vacate(flight.destination, copy.address, copy.num_bytes)
        del self._flights[flight.key, flight.destination]
        self._residency.abort(flight.key, flight.destination)

    def _copy(self, key: BlockKey, tier: Tier) -> Copy:
        copy = self._residency.copy(key, tier)
        assert copy is not None, f"{key!r} has no copy in {tier}"
        return copy
