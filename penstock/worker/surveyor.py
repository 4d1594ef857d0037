"""`Surveyor`: answers a `Survey`: where a worker's blocks are, in which codec, how warm, and what
is under way.

Reads what the cache, the desks and the shelves own, and changes nothing. Totals are O(1) but for
the number of tiers. Single blocks are walked in the order of their places, and no answer looks at
more than `SCAN_MAX` of them: it says where to go on. A worker goes on with its steps meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from penstock.core.block import BlockState
from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Send
from penstock.core.residency import (
    DEVICE,
    ENTRIES_MAX,
    Place,
    PlacedBlock,
    PoolResidency,
    Survey,
    Surveyed,
    TierResidency,
)
from penstock.core.types import CONTROLLER, BlockHash, BlockId, RequestId
from penstock.kv.cache import KVCache
from penstock.kv.policy import Temperature
from penstock.kv.tiers import RAW
from penstock.worker.decode import PullDesk
from penstock.worker.shelf import Shelf
from penstock.worker.source import SourceDesk
from penstock.worker.tiers import TierDesk

SCAN_MAX: Final = 8192
"""Blocks that one answer looks at: some ten milliseconds of the worker's loop."""
NAME_DIGITS: Final = 32
"""Hexadecimal digits of a whole name."""


Flights = Sequence[Mapping[BlockId, str]]
"""Per group, what is under way with a block of the pool."""


class Surveyor:
    """What it looks at is the worker's; the worker core calls `answer`."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        offers: SourceDesk,
        pulls: PullDesk,
        tiers: TierDesk,
    ) -> None:
        self._config = config
        self._kv = kv
        self._offers = offers
        self._pulls = pulls
        self._tiers = tiers

    def answer(self, survey: Survey, now_ns: int) -> Command:
        """Return the answer."""
        blocks: list[PlacedBlock] = []
        following: Place | None = None
        if survey.limit > 0:
            blocks, following = self._page(survey, now_ns)
        surveyed = Surveyed(
            number=survey.number,
            worker_id=self._config.worker_id,
            epoch=self._config.epoch,
            pools=tuple(self._pools()),
            tiers=tuple(self._tier(shelf) for shelf in self._tiers.shelves),
            num_onboards=self._tiers.num_fetches,
            blocks=tuple(blocks),
            next=following,
        )
        return Send(CONTROLLER, surveyed)

    # ------------------------------------------------------------------------------ totals

    def _pools(self) -> Iterator[PoolResidency]:
        sizes = self._kv.layout.block_bytes
        for group, size in zip(self._kv.groups, sizes, strict=True):
            pool = group.pool
            yield PoolResidency(
                window=group.window,
                num_blocks=pool.num_blocks,
                num_free=pool.num_free,
                num_active=pool.num_active,
                num_cached=pool.num_cached,
                longest_run=pool.allocator.largest_free,
                block_bytes=size,
                codec=RAW,
                num_retained=self._kv.retention.num_retained,
            )

    def _tier(self, shelf: Shelf) -> TierResidency:
        num_arriving, num_reading = shelf.num_moving
        return TierResidency(
            load=shelf.load(),
            codec=shelf.codec.name,
            slot_bytes=shelf.slot_bytes,
            num_arriving=num_arriving,
            num_reading=num_reading,
            decode_ns=shelf.codec.decode_ns,
        )

    # ------------------------------------------------------------------------------ single blocks

    def _page(self, survey: Survey, now_ns: int) -> tuple[list[PlacedBlock], Place | None]:
        """Return up to `limit` blocks, and where the rest begins."""
        limit = min(survey.limit, ENTRIES_MAX)
        found: list[PlacedBlock] = []
        for num_seen, (place, entry) in enumerate(self._entries(survey, now_ns)):
            if len(found) == limit or num_seen == SCAN_MAX:
                return found, place
            if entry is not None:
                found.append(entry)
        return found, None

    def _entries(self, survey: Survey, now_ns: int) -> Iterator[tuple[Place, PlacedBlock | None]]:
        """Yield every place from the start on, with the block there if it is asked for."""
        if survey.request_ids:
            entries = self._of_requests(survey.request_ids, now_ns)
        elif len(survey.name) == NAME_DIGITS:
            entries = self._of_name(BlockHash(bytes.fromhex(survey.name)), now_ns)
        else:
            yield from self._all(survey, now_ns)
            return
        for index, entry in enumerate(entries):
            if index >= survey.start[1]:
                yield (0, index), entry

    def _all(self, survey: Survey, now_ns: int) -> Iterator[tuple[Place, PlacedBlock | None]]:
        """Walk the pools and then the tiers, from the start on."""
        flights = self._in_flight()
        num_groups = len(self._kv.groups)
        first, begin = survey.start
        for section in range(first, num_groups + len(self._tiers.shelves)):
            if section < num_groups:
                for block in range(begin, self._kv.groups[section].pool.num_blocks):
                    block_id = BlockId(block)
                    entry = None
                    if _is_called(self._name(section, block_id), survey.name):
                        entry = self._in_pool(section, block_id, flights)
                    yield (section, block), entry
            else:
                shelf = self._tiers.shelves[section - num_groups]
                for offset, name in enumerate(shelf.part(begin, begin + SCAN_MAX + 1), begin):
                    is_wanted = _is_called(name, survey.name)
                    entry = self._on_shelf(shelf, name, now_ns) if is_wanted else None
                    yield (section, offset), entry
            begin = 0

    def _of_requests(
        self, request_ids: Sequence[RequestId], now_ns: int
    ) -> Iterator[PlacedBlock | None]:
        flights = self._in_flight()
        tables = [self._kv.held(request_id) or () for request_id in request_ids]
        for group, block_ids in (entry for table in tables for entry in enumerate(table)):
            for block_id in block_ids:
                yield self._in_pool(group, block_id, flights)
                name = self._name(group, block_id)
                yield from self._copies(name, now_ns) if name is not None else ()

    def _of_name(self, name: BlockHash, now_ns: int) -> Iterator[PlacedBlock | None]:
        flights = self._in_flight()
        for index, group in enumerate(self._kv.groups):
            block_id = group.pool.prefix_cache.find(name)
            if block_id is not None:
                yield self._in_pool(index, block_id, flights)
        yield from self._copies(name, now_ns)

    def _copies(self, name: BlockHash, now_ns: int) -> Iterator[PlacedBlock]:
        for shelf in self._tiers.shelves:
            if shelf.knows(name):
                yield self._on_shelf(shelf, name, now_ns)

    def _name(self, group: int, block_id: BlockId) -> BlockHash | None:
        return self._kv.groups[group].pool.prefix_cache.name(block_id)

    def _in_pool(self, group: int, block_id: BlockId, flights: Flights) -> PlacedBlock | None:
        """Return a block of the pool; None for one that is free."""
        pool = self._kv.groups[group].pool
        state = pool.state(block_id)
        if state is BlockState.FREE:
            return None
        cache = pool.prefix_cache
        name = cache.name(block_id)
        idle_ns = cache.idle_ns(block_id) if cache.is_idle(block_id) else None
        return PlacedBlock(
            place=DEVICE,
            group=group,
            index=block_id,
            state="spare" if cache.is_spare(block_id) else state.value,
            name=name,
            codec=RAW,
            temperature=self._warmth(name, is_held=idle_ns is None),
            num_bytes=self._kv.layout.block_bytes[group],
            num_holders=pool.num_holders(block_id),
            in_flight=self._flight_of(name, block_id, flights[group]),
            idle_ns=idle_ns,
            retained_ns=self._kv.retention.remaining_ns(name) if name is not None else 0,
        )

    def _on_shelf(self, shelf: Shelf, name: BlockHash, now_ns: int) -> PlacedBlock:
        residency = self._tiers.residency
        copy = residency.copy(name, shelf.tier)
        assert copy is not None, f"{name.hex()} is not in {shelf.name}"
        state = "present" if name in shelf else "condemned" if copy.is_present else "arriving"
        return PlacedBlock(
            place=shelf.label,
            group=0,
            index=shelf.slot(name),
            state=state,
            name=name,
            codec=copy.codec,
            temperature=self._warmth(name),
            num_bytes=copy.num_bytes,
            num_holders=copy.num_holds,
            in_flight="read" if copy.num_holds else "" if copy.is_present else "written",
            idle_ns=residency.idle_ns(name, now_ns),
            retained_ns=self._kv.retention.remaining_ns(name),
            decode_ns=copy.decode_ns,
        )

    def _warmth(self, name: BlockHash | None, *, is_held: bool = False) -> str:
        """Return how warm a block is: what is held is in use, and what has no name never again."""
        if is_held or name is None:
            warmth = Temperature.HOT if is_held else Temperature.COLD
        else:
            warmth = self._tiers.temperature(name)
        return str(warmth.value)

    # ------------------------------------------------------------------------------ in flight

    def _in_flight(self) -> Flights:
        """Return what is on its way into or out of each pool, by block. O(blocks that are)."""
        flights: list[dict[BlockId, str]] = [{} for _ in self._kv.groups]
        for what, request_ids in (
            ("pulled from a peer", self._pulls.arrivals),
            ("read by a peer", self._offers.crossings),
        ):
            for request_id in request_ids:
                for group, block_ids in enumerate(self._kv.held(request_id) or ()):
                    flights[group].update(dict.fromkeys(block_ids, what))
        flights[0].update(dict.fromkeys(self._tiers.onboarding, "from a tier"))
        for group, cache in enumerate(self._kv.groups):
            flights[group].update(dict.fromkeys(cache.pool.relocating, "relocated"))
        return flights

    def _flight_of(
        self, name: BlockHash | None, block_id: BlockId, flights: Mapping[BlockId, str]
    ) -> str:
        what = flights.get(block_id, "")
        if not what and name is not None and name in self._tiers.residency:
            for shelf in self._tiers.shelves:
                if shelf.knows(name) and not self._tiers.residency.is_present(name, shelf.tier):
                    return f"to {shelf.label}"
        return what


def _is_called(name: BlockHash | None, digits: str) -> bool:
    return not digits or (name is not None and name.hex().startswith(digits))
