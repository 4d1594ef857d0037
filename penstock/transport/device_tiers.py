"""The mover between a pool on a GPU and the tiers below it.

Between the pool and slots in the host's memory a span is one copy by the device, whose pages are
pinned for it; where slots hold encoded blocks and the device has the codec, blocks are encoded and
decoded there and only codes cross. Everything else (disks, slower memory, siblings, other codecs)
passes by pinned staging memory, and `tier_mover.py` does what it does for a worker without a GPU.

Copies run on a stream of the thread that asks, beside the model's, and their end is asked for.
Decides nothing. Called as `TierMover` is, on a thread for each pair of tiers.

**Not run on a GPU yet**: as `cuda_ipc.py`.
"""

import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from msgspec.structs import replace

from penstock.core.errors import DeadlineExceeded
from penstock.core.events import Move, MoveDone, Span
from penstock.core.types import MIB, NO_DIGEST, BlockId, Digest
from penstock.transfer.digest import TakeDigests, take_digests
from penstock.transfer.plan import SpanArray, cut, span_array
from penstock.transfer.region import Region, bounds_error
from penstock.transport.coded import CodedTier, Copied, Ints, flatten
from penstock.transport.cuda_driver import Copy, Driver
from penstock.transport.cuda_ipc import BYTES_PER_S_MIN, NAP_S, SILENCE_S, SPIN_S, CudaRegion
from penstock.transport.sibling import SiblingTiers
from penstock.transport.tier import MemoryTier
from penstock.transport.tier_mover import OpenTier, TierMover

STAGING_BYTES: Final = 32 * MIB


class DeviceCodec(Protocol):
    """A codec that works on the device, from blocks of the pool to rows of `staging` and back."""

    @property
    def name(self) -> str:
        """The method's name, that of the codec on the CPU."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block, which a row begins with."""

    @property
    def staging(self) -> CudaRegion:
        """Rows on the device."""

    def encode(self, block_ids: Sequence[int]) -> None:
        """Encode block `block_ids[i]` into row i; return when that is done."""

    def decode(self, block_ids: Sequence[int]) -> None:
        """Decode row i into block `block_ids[i]`; return when that is done."""


@dataclass(eq=False, slots=True)
class _Lane:
    """What one move at a time has for itself."""

    driver: Driver
    staging: Region
    host: TierMover
    codecs: dict[str, DeviceCodec | None] = field(default_factory=dict)


class DeviceTierMover:
    """Copies blocks of the one KV group between `pool` and `tiers`, or out of those of `siblings`.

    `take` takes digests of the pool's blocks, `make_driver` gives a stream each time it is called,
    `make_codec` a codec on the device by its name, or None where it has not got it.
    Raises: `BackendUnavailable` when memory cannot be pinned.
    """

    def __init__(
        self,
        pool: CudaRegion,
        tiers: Mapping[str, OpenTier],
        take: TakeDigests,
        make_driver: Callable[[], Driver],
        *,
        make_codec: Callable[[str], DeviceCodec | None] = lambda _name: None,
        clock: Callable[[], int] = time.monotonic_ns,
        siblings: SiblingTiers | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._take = take
        self._make_driver = make_driver
        self._make_codec = make_codec
        self._clock = clock
        self._siblings = siblings
        self._silence_s = silence_s
        self._lanes: list[_Lane] = []
        self._pinned: list[Region] = []
        self._pins = make_driver()
        for tier in tiers.values():
            memory = _memory(tier)
            if memory is not None:
                self._pin(memory.region)

    def close(self) -> None:
        """Let go of the pages, before tiers let go of their memory. No move may be under way."""
        for region in self._pinned:
            self._pins.unpin(self._pool.device, region.address)
        self._pinned.clear()
        self._lanes.clear()

    def _pin(self, region: Region) -> None:
        self._pins.pin(self._pool.device, region.address, region.capacity_bytes)
        self._pinned.append(region)

    def execute(self, move: Move) -> MoveDone:
        """Carry out a move; blocks until it is done. Errors are those of `TierMover`.

        Raises: `DeadlineExceeded` when the device comes to no end: its copies may still land, so
        the worker has to end.
        """
        ends = move.tiers
        assert ends is not None, f"move {move.move_id} is for the block mover"
        lane = self._take_lane()
        if ends.source and ends.destination:
            done = lane.host.execute(move)
        else:
            done = self._directly(lane, move) or self._by_staging(lane, move)
        self._lanes.append(lane)
        return done

    def _take_lane(self) -> _Lane:
        try:
            return self._lanes.pop()
        except IndexError:  # several threads take them
            return self._new_lane()

    def _new_lane(self) -> _Lane:
        num_rows = max(1, STAGING_BYTES // self._pool.block_bytes)
        memory = mmap.mmap(-1, num_rows * self._pool.block_bytes)
        staging = Region(np.frombuffer(memory, np.uint8).reshape(num_rows, -1))
        self._pin(staging)
        host = TierMover(staging, self._tiers, self._clock, self._siblings)
        return _Lane(self._make_driver(), staging, host)

    # ------------------------------------------------------------------ slots in pinned memory

    def _directly(self, lane: _Lane, move: Move) -> MoveDone | None:
        """Copy between the pool and pinned slots, or return None where that is not what is asked
        for.
        """
        ends = move.tiers
        assert ends is not None, move.move_id
        is_own = self._siblings is None or move.source == self._siblings.worker_id
        tier = self._tiers.get(ends.source or ends.destination)
        memory = None if tier is None else _memory(tier)
        if tier is None or memory is None or not (is_own or ends.destination):
            return None
        started_ns = self._clock()
        spans = span_array(move.spans[0])
        (digests,) = move.digests or ((),)
        self._check(move, spans, memory.num_slots)
        if isinstance(tier, CodedTier):
            codec = self._codec(lane, tier)
            if codec is None:
                return None
            carry_out = self._encode if ends.destination else self._decode
            copied = carry_out(lane, codec, memory, spans, digests)
        else:
            self._copy(lane.driver, self._copies(spans, memory.region, is_down=not ends.source))
            landed = [BlockId(int(i)) for i in flatten(spans)[1]]
            copied = Copied(self._take(landed) if ends.source else tuple(digests))
        return MoveDone(
            move_id=move.move_id,
            num_bytes=int(spans[:, 2].sum()) * tier.block_bytes,
            num_spans=len(spans),
            transport=tier.kind,
            started_ns=started_ns,
            finished_ns=self._clock(),
            digests=(copied.digests,),
            codec_ns=copied.codec_ns,
        )

    def _check(self, move: Move, spans: SpanArray, num_slots: int) -> None:
        """Assert that spans are inside both: the worker core books slots and blocks itself."""
        ends, num_blocks = move.tiers, self._pool.num_blocks
        assert ends is not None, move.move_id
        sizes = (num_blocks, num_slots) if ends.destination else (num_slots, num_blocks)
        wrong = bounds_error(spans, source_blocks=sizes[0], destination_blocks=sizes[1])
        assert wrong is None, f"move {move.move_id}: {wrong}"

    def _encode(
        self,
        lane: _Lane,
        codec: DeviceCodec,
        memory: MemoryTier,
        spans: SpanArray,
        _digests: Sequence[Digest],
    ) -> Copied:
        """Encode blocks on the device and copy the codes into slots."""
        blocks, slots = flatten(spans)
        rows, codec_ns = codec.staging.num_blocks, 0
        for start in range(0, len(blocks), rows):
            some = slots[start : start + rows]
            started_ns = self._clock()
            codec.encode(blocks[start : start + rows].tolist())
            codec_ns += self._clock() - started_ns
            self._copy(lane.driver, _rows(codec, memory.region, some, is_down=True))
        whole = memory.region.blocks[:, : codec.encoded_bytes]
        return Copied(take_digests(whole, [BlockId(int(slot)) for slot in slots]), codec_ns)

    def _decode(
        self,
        lane: _Lane,
        codec: DeviceCodec,
        memory: MemoryTier,
        spans: SpanArray,
        digests: Sequence[Digest],
    ) -> Copied:
        """Decode the slots that are what their digests say; digests of the others are none."""
        slots, blocks = flatten(spans)
        whole = memory.region.blocks[:, : codec.encoded_bytes]
        found = take_digests(whole, [BlockId(int(slot)) for slot in slots])
        good = np.flatnonzero([a == b for a, b in zip(found, digests, strict=True)])
        rows, codec_ns = codec.staging.num_blocks, 0
        for start in range(0, len(good), rows):
            some = good[start : start + rows]
            self._copy(lane.driver, _rows(codec, memory.region, slots[some], is_down=False))
            started_ns = self._clock()
            codec.decode(blocks[some].tolist())
            codec_ns += self._clock() - started_ns
        landed = [NO_DIGEST] * len(slots)
        content = self._take([BlockId(int(blocks[at])) for at in good])
        for at, digest in zip(good.tolist(), content, strict=True):
            landed[at] = digest
        return Copied(tuple(landed), codec_ns)

    def _codec(self, lane: _Lane, tier: CodedTier) -> DeviceCodec | None:
        name = tier.codec.name
        if name not in lane.codecs:
            codec = lane.codecs[name] = self._make_codec(name)
            assert codec is None or codec.encoded_bytes == tier.codec.encoded_bytes, name
        return lane.codecs[name]

    # ------------------------------------------------------------------------------ by staging

    def _by_staging(self, lane: _Lane, move: Move) -> MoveDone:
        """Let the host's mover do it with staging memory for a pool, some blocks at a time."""
        ends = move.tiers
        assert ends is not None, move.move_id
        started_ns, spans = self._clock(), span_array(move.spans[0])
        sources, targets = flatten(spans)
        digests, dones = move.digests[0] if move.digests else (), []
        for start in range(0, len(sources), lane.staging.num_blocks):
            some = slice(start, start + lane.staging.num_blocks)
            rows = np.arange(len(sources[some]))
            if ends.destination:
                down = cut(sources[some], rows)
                self._copy(lane.driver, self._copies(down, lane.staging, is_down=True))
                listed = _listed(cut(rows, targets[some]))
            else:
                listed = _listed(cut(sources[some], rows))
            part = replace(
                move,
                spans=(listed,),
                digests=(tuple(digests[some]),) if digests else (),
                tiers=replace(ends, names=ends.names[some]),
            )
            done = lane.host.execute(part)
            if done.error is None and ends.source:
                done = self._land(lane, done, targets[some])
            dones.append(done)
            if done.error is not None:
                break
        return _whole(dones, move, spans, started_ns)

    def _land(self, lane: _Lane, done: MoveDone, blocks: Ints) -> MoveDone:
        """Copy staging memory into the pool; what is there now has these digests."""
        up = cut(np.arange(len(blocks)), blocks)
        self._copy(lane.driver, self._copies(up, lane.staging, is_down=False))
        there = self._take([BlockId(int(block)) for block in blocks])
        (staged,) = done.digests
        kept = (
            digest if before != NO_DIGEST else NO_DIGEST
            for digest, before in zip(there, staged, strict=True)
        )
        return replace(done, digests=(tuple(kept),))

    def _copies(self, spans: SpanArray, memory: Region, *, is_down: bool) -> list[Copy]:
        """Return a copy a span, between blocks of the pool and rows or slots of pinned memory."""
        size, pool, host = self._pool.block_bytes, self._pool.address, memory.address
        origin, target = (pool, host) if is_down else (host, pool)
        assert memory.block_bytes == size, (memory.block_bytes, size)
        return [
            Copy(target + to * size, origin + start * size, count * size)
            for start, to, count in spans.tolist()
        ]

    def _copy(self, driver: Driver, copies: Sequence[Copy]) -> None:
        """Copy, and wait for the event behind. Raises: `DeadlineExceeded`."""
        if not copies:
            return
        limit_s = self._silence_s + sum(copy.num_bytes for copy in copies) / BYTES_PER_S_MIN
        driver.copy(self._pool.device, copies)
        started = time.monotonic()
        while not driver.is_done(self._pool.device):
            waited_s = time.monotonic() - started
            if waited_s > limit_s:
                raise DeadlineExceeded(
                    f"GPU {self._pool.device} has copied to or from the host for {limit_s:.1f} s"
                )
            if waited_s > SPIN_S:
                time.sleep(NAP_S)


def _memory(tier: OpenTier) -> MemoryTier | None:
    """Return the slots that the device copies itself: those in the host's own memory."""
    store = tier.store if isinstance(tier, CodedTier) else tier
    # Slower memory is a kind of its own, whose time has to pass.
    return store if type(store) is MemoryTier else None


def _rows(codec: DeviceCodec, memory: Region, slots: Ints, *, is_down: bool) -> list[Copy]:
    """Return the copies between the codec's rows and slots, which may be wider."""
    staging, width, copies = codec.staging, memory.block_bytes, []
    for row, slot in enumerate(slots.tolist()):
        ends = staging.address + row * staging.block_bytes, memory.address + slot * width
        origin, target = ends if is_down else ends[::-1]
        copies.append(Copy(target, origin, codec.encoded_bytes))
    return copies


def _listed(spans: SpanArray) -> tuple[Span, ...]:
    return tuple(Span(BlockId(a), BlockId(b), count) for a, b, count in spans.tolist())


def _whole(dones: Sequence[MoveDone], move: Move, spans: SpanArray, started_ns: int) -> MoveDone:
    """Return what the parts of a move came to."""
    last = dones[-1]
    digests = tuple(digest for done in dones for digest in (done.digests or ((),))[0])
    return replace(
        last,
        num_bytes=sum(done.num_bytes for done in dones),
        num_spans=len(spans),
        started_ns=started_ns,
        digests=() if last.error else (digests,),
        codec_ns=sum(done.codec_ns for done in dones),
        move_id=move.move_id,
    )
