"""`Shelf`: the books of one tier below a worker's pool: which block is in which slot.

A copy is *arriving* while a move writes it, then it can be read; while a move reads it, it is held
and stays. Bytes and states are those of the worker's `Residency`; slots come from the same kind of
allocator as blocks, so that what goes in together lies in one piece. Knows no request and moves
nothing: `worker/tiers.py` and `worker/onboard.py`, which call it, do. `worker/siblings.py` has what
other workers of the host say of theirs.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from penstock.core.block import accepts_loss
from penstock.core.tiers import KeptBlock, ShelfUsed, TierConfig, TierLoad
from penstock.core.types import NO_DIGEST, BlockHash, BlockId, Digest
from penstock.kv.allocator import SegmentAllocator
from penstock.kv.compression import CodecBooks, Direction
from penstock.kv.eviction import EvictionOrder, last_of_retained, make_order
from penstock.kv.residency import Residency
from penstock.kv.retention import Retention
from penstock.kv.tiers import BlockKey, CodecSpec, Tier


class Shelf:
    """One tier, for blocks of `block_bytes`. `resumes_ns` is when it may be written again after a
    failure.
    """

    def __init__(
        self,
        config: TierConfig,
        residency: Residency,
        block_bytes: int,
        retention: Retention,
    ) -> None:
        self.name = config.name
        self.label = config.label or config.name
        self.num_slots = config.num_slots
        self.resumes_ns = 0
        self.changes: dict[BlockHash, None] = {}
        """Names that came or went since this was last emptied."""
        self.num_hits = self.num_shared = self.bytes_in = self.bytes_out = 0
        self.raw_bytes_in = self.raw_bytes_out = 0
        self.num_corrupt = self.num_stale = self.num_failed = self.num_evicted = 0
        self.exposed_ns = 0
        self.codec = CodecSpec(
            name=config.codec,
            block_bytes=config.slot_bytes or block_bytes,
            decode_ns=config.decode_ns,
        )
        self.codec_books = CodecBooks()
        self.is_lossy = config.is_lossy
        self.slot_bytes = self.codec.block_bytes
        self.num_wanted = self.num_declined = 0
        self.num_reading = 0
        """Blocks on their way out for requests."""
        self._retention = retention
        self._tier = Tier(config.name)
        self._residency = residency
        self._block_bytes = block_bytes
        self._slots = SegmentAllocator(config.num_slots)
        self._order: EvictionOrder = make_order(config.eviction)
        self._digests: dict[BlockHash, Digest] = {}
        self._condemned: set[BlockHash] = set()
        self._slots.take(sorted(BlockId(kept.slot) for kept in config.kept))
        for kept in config.kept:
            address = kept.slot * self.slot_bytes
            is_new = residency.add(kept.name, self._tier, self.codec, address)
            assert is_new, f"{self.name} came with more than it holds"
            self._arrive(kept.name, kept.digest)

    def __contains__(self, name: BlockHash) -> bool:
        """Tell whether a block can be read here."""
        return self._residency.is_present(name, self._tier) and name not in self._condemned

    def takes(self, name: BlockHash) -> bool:
        """Tell whether a block may lie here: one that must come back as it was, not everywhere."""
        return not self.is_lossy or accepts_loss(name)

    def is_right(self, block: KeptBlock, landed: Digest) -> bool:
        """Tell by the digest of what came out of a slot whether it is what went in.

        A lossy codec's slot is compared before it is decoded, and gives another content.
        """
        return landed != NO_DIGEST and (self.is_lossy or landed == block.digest)

    def knows(self, name: BlockHash) -> bool:
        """Tell whether a block is here or arriving."""
        return self._residency.copy(name, self._tier) is not None

    def names(self) -> list[BlockHash]:
        """Return the blocks that can be read here."""
        return [name for name in self._digests if name in self]

    @property
    def books(self) -> "Shelf":
        """Where it is counted what is read from here: a sibling's tier has others."""
        return self

    @property
    def num_free(self) -> int:
        """Slots without a block."""
        return self._slots.num_free

    def slot(self, name: BlockHash) -> BlockId:
        """Return where a block is, or will be."""
        copy = self._residency.copy(name, self._tier)
        assert copy is not None, f"{name.hex()} is not in {self.name}"
        return BlockId(copy.address // self.slot_bytes)

    def digest(self, name: BlockHash) -> Digest:
        """Return what the digest of a block has to be."""
        return self._digests[name]

    def locate(self, name: BlockHash) -> KeptBlock:
        """Return where a block is, and what its digest has to be."""
        return KeptBlock(self.slot(name), name, self._digests[name])

    def contents(self) -> list[KeptBlock]:
        """Return all that can be read here."""
        return [self.locate(name) for name in self._digests if name in self]

    # ------------------------------------------------------------------------------ in and out

    def begin(self, names: Sequence[BlockHash]) -> list[BlockId]:
        """Take slots for blocks that are about to arrive; there must be room."""
        slots = self._slots.allocate(len(names))
        assert slots is not None, f"{self.name} has {self.num_free} slots, not {len(names)}"
        for name, slot in zip(names, slots, strict=True):
            address = slot * self.slot_bytes
            is_begun = self._residency.begin(name, self._tier, self.codec, address)
            assert is_begun, f"{self.name} has slots and no bytes"
        return slots

    def finish(self, name: BlockHash, digest: Digest) -> None:
        """Note that a block has arrived."""
        self._residency.finish(name, self._tier)
        self._arrive(name, digest)
        self.bytes_in += self.slot_bytes
        self.raw_bytes_in += self._block_bytes

    def abort(self, name: BlockHash) -> None:
        """Give the slot of a block back that did not arrive."""
        slot = self.slot(name)
        self._residency.abort(name, self._tier)
        self._slots.free([slot])

    def drop(self, name: BlockHash, *, is_evicted: bool = False) -> None:
        """Give a block up that no move reads."""
        slot = self.slot(name)
        self._residency.drop(name, self._tier)
        self._slots.free([slot])
        self._order.remove(name, evicted=is_evicted)
        del self._digests[name]
        self.changes[name] = None
        self.num_evicted += is_evicted

    def part(self, begin: int, end: int) -> list[BlockHash]:
        """Return the blocks at places `[begin, end)` in the order in which they arrived."""
        return list(islice(self._digests, begin, end))

    @property
    def tier(self) -> Tier:
        """Which tier it is."""
        return self._tier

    @property
    def num_moving(self) -> tuple[int, int]:
        """Blocks on their way in, and blocks that requests have on their way out."""
        return self.num_slots - self.num_free - len(self._digests), self.num_reading

    def hold(self, names: Iterable[BlockHash]) -> None:
        """Keep blocks while a move reads them."""
        for name in names:
            self._residency.hold(name, self._tier)

    def release(self, name: BlockHash) -> None:
        """Undo one `hold`; what was condemned meanwhile goes with the last."""
        self._residency.release(name, self._tier)
        if name in self._condemned and not self.is_held(name):
            self._condemned.remove(name)
            self.drop(name)

    def confirm(self, name: BlockHash) -> None:
        """Note that a move has brought a block whole: it is given up last."""
        self.num_hits += 1
        self.touch(name)

    def reject(self, block: KeptBlock, *, is_read: bool) -> None:
        """Note that a block came wrong, or not at all, and let nobody find it."""
        self.num_corrupt += is_read
        self.num_failed += not is_read
        self.condemn(block.name)

    def hear(self, event: ShelfUsed) -> None:
        """Take in what a sibling has read here; what it found wrong and is still there, is."""
        for name in event.right:
            if name in self:
                self.touch(name)
        for block in event.wrong:
            if block.name in self and self.locate(block.name) == block:
                self.num_corrupt += 1
                self.condemn(block.name)

    def condemn(self, name: BlockHash) -> None:
        """Let nobody find a block that is wrong, and drop it as soon as no move reads it."""
        if self.is_held(name):
            self._condemned.add(name)
        elif name in self:
            self.drop(name)

    def is_held(self, name: BlockHash) -> bool:
        """Tell whether a move reads a block that is here."""
        copy = self._residency.copy(name, self._tier)
        return copy is not None and copy.num_holds > 0

    def touch(self, name: BlockHash) -> None:
        """Note that a block was wanted: it goes last."""
        self._order.touch(name)

    def hold_oldest(self, count: int) -> list[BlockHash]:
        """Hold up to `count` of the blocks that are to be given up first, and return them; what is
        to be retained only where there is nothing else.
        """
        oldest: list[BlockHash] = []
        while len(oldest) < count:
            victim = last_of_retained(self._order, self._can_go, self._is_retained)
            if victim is None:
                break
            assert isinstance(victim, bytes), victim
            oldest.append(BlockHash(victim))
            self.hold(oldest[-1:])
        return oldest

    def _can_go(self, key: BlockKey) -> bool:
        return isinstance(key, bytes) and not self.is_held(BlockHash(key))

    def _is_retained(self, key: BlockKey) -> bool:
        return isinstance(key, bytes) and self._retention.strength(BlockHash(key)) > 0

    def _arrive(self, name: BlockHash, digest: Digest) -> None:
        self._digests[name] = digest
        self._order.insert(name, 1.0)
        self.changes[name] = None

    def load(self) -> TierLoad:
        """Return how full this is, and its totals."""
        return TierLoad(
            name=self.label,
            num_slots=self.num_slots,
            num_used=self.num_slots - self.num_free,
            num_hits=self.num_hits,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            num_corrupt=self.num_corrupt,
            num_failed=self.num_failed,
            num_evicted=self.num_evicted,
            exposed_ns=self.exposed_ns,
            num_shared=self.num_shared,
            num_stale=self.num_stale,
            raw_bytes_in=self.raw_bytes_in,
            raw_bytes_out=self.raw_bytes_out,
            encode_ns=self.codec_books.busy_ns[Direction.ENCODE],
            decode_ns=self.codec_books.busy_ns[Direction.DECODE],
            exposed_decode_ns=self.codec_books.exposed_ns,
            num_wanted=self.num_wanted,
            num_declined=self.num_declined,
        )

    def check(self) -> None:
        """Assert that slots and bytes agree."""
        self._slots.check()
        used_bytes = (self.num_slots - self.num_free) * self.slot_bytes
        assert used_bytes == self._residency.used_bytes(self._tier), (self.name, used_bytes)


def takers_of(name: BlockHash, shelves: Sequence[Shelf]) -> list[Shelf]:
    """Return the tiers that a block may lie in, in their order."""
    return [shelf for shelf in shelves if shelf.takes(name)]
