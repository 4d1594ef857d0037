"""`TierDesk`: the tiers below a worker's pool: what goes down, and when.

A block that nobody holds any more is written to the nearest tier: at once where the worker is
idle (write-through), else when the pool runs short (write-back, before the pool gives it up).
Nothing is held for it: when a block was handed out anew before its copy ended, its generation says
so, and the copy is void. What a tier gives up for others, the one used longest ago first, sinks to
the next one, and out of the last one it is dropped. What a sibling has in a tier of the same name
is not written once more: a host keeps one copy, and every worker of it reads it there.

Reading back is `worker/onboard.py`'s, slots are `worker/shelf.py`'s, what others have is
`worker/siblings.py`'s. A worker that has no sibling and is never assigned a prompt would write for
nobody, and does not. Without tiers every method returns at once. Called by the worker core.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Command, Move, MoveClass, MoveDone, SubmitMove, TierEnds
from penstock.core.tiers import KeptBlock, ShelfChanged, ShelfUsed, TierLoad
from penstock.core.types import NO_DIGEST, NS_PER_S, BlockHash, BlockId, Digest, RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.kv.residency import Residency
from penstock.kv.tiers import Tier, TierSpec
from penstock.transfer.plan import align
from penstock.worker.numbers import Numbers
from penstock.worker.onboard import OnboardDesk
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence
from penstock.worker.shelf import Shelf
from penstock.worker.siblings import Siblings

BLOCKS_MAX: Final = 64
"""In one move down: what is to come up meanwhile waits no longer than that takes."""
REST_NS: Final = 10 * NS_PER_S
"""A tier that could not be written is left alone for so long."""
NOBODY: Final = RequestId("")


@dataclass(frozen=True, slots=True)
class _Write:
    """Blocks on their way down: out of the pool (`generations` as they were) or another shelf."""

    names: list[BlockHash]
    digests: tuple[Digest, ...]
    into: Shelf
    out_of: Shelf | None = None
    block_ids: tuple[BlockId, ...] = ()
    generations: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    """Which of them is at which place in the move."""

    def landed(self, done: MoveDone) -> Items[Digest]:
        """Return by what the blocks are known where they are now, in the order of `names`.

        That is another digest than that of the content where a codec is between.
        """
        if done.error is not None or not done.digests:
            return self.digests
        found = list(self.digests)
        for at, digest in zip(self.order, done.digests[0], strict=True):
            found[at] = digest
        return found


class TierDesk:
    """Owns the shelves, nearest first, and the moves down."""

    def __init__(
        self, config: WorkerConfig, kv: KVCache, scheduler: Scheduler, move_ids: Numbers
    ) -> None:
        self.num_missed = 0
        """Blocks that the pool had overwritten before they were copied."""
        self._config = config
        self._kv = kv
        self._scheduler = scheduler
        self._move_ids = move_ids
        self._shelves: list[Shelf] = []
        self._pending: dict[BlockHash, None] = {}
        self._writes: dict[int, _Write] = {}
        self._has_prompts = False
        self.residency = Residency(())
        self._parked: list[BlockHash] = []
        self._news: list[BlockHash] = []
        if config.tiers and config.is_prefix_caching:
            self._open_tiers()
        self._siblings = Siblings(config, self._shelves)
        self._onboards = OnboardDesk(config, kv, scheduler, self._shelves, self._siblings, move_ids)

    def _open_tiers(self) -> None:
        (block_bytes,) = self._config.layout.block_bytes
        specs = [
            TierSpec(
                tier=Tier(tier.name),
                capacity_bytes=tier.num_slots * (tier.slot_bytes or block_bytes),
            )
            for tier in self._config.tiers
        ]
        self.residency = Residency(specs)
        self._shelves = [Shelf(tier, self.residency, block_bytes) for tier in self._config.tiers]
        self._kv.groups[0].pool.prefix_cache.parked = self._parked
        self._news = [kept.name for tier in self._config.tiers for kept in tier.kept]

    @property
    def num_fetches(self) -> int:
        """Fetches under way; each holds blocks of the pool."""
        return self._onboards.num_fetches

    @property
    def shelves(self) -> Items[Shelf]:
        """The tiers, nearest first."""
        return self._shelves

    @property
    def onboarding(self) -> list[BlockId]:
        """Blocks of the pool that are being filled from tiers."""
        return self._onboards.filling

    def add(self, sequence: Sequence, now_ns: int) -> None:
        """Take a new sequence in: it goes to the scheduler, at once or with its prefix brought."""
        if not self._shelves:
            self._scheduler.add(sequence)
            return
        self._has_prompts = True
        self._onboards.add(sequence, now_ns)

    def meet(self, info: WorkerInfo) -> None:
        """Take in a worker that may be a sibling."""
        self._siblings.meet(info)

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Forget what a worker had that is gone."""
        self._siblings.forget(worker_id, epoch)

    def hear(self, event: ShelfChanged | ShelfUsed) -> None:
        """Take in what a sibling says of its tiers, or of ours."""
        if isinstance(event, ShelfChanged):
            self._siblings.hear(event)
            return
        for shelf in self._shelves if event.epoch == self._config.epoch else ():
            if shelf.name == event.tier:
                shelf.hear(event)

    def note_step(self, num_tokens: int, took_ns: int) -> None:
        """Remember what computing costs."""
        if self._shelves:
            self._onboards.note_step(num_tokens, took_ns)

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return the moves that are to begin now."""
        if not self._shelves:
            return []
        commands = self._onboards.take_commands()
        self._note_parked(now_ns)
        self._tell_names()
        pool = self._kv.groups[0].pool
        is_short = 2 * pool.num_free < pool.num_blocks
        is_writing = any(write.out_of is None for write in self._writes.values())
        if self._pending and not is_writing and (is_idle or is_short):
            commands += self._offload(now_ns)
        return commands + self._siblings.due(now_ns, is_idle=is_idle)

    def land(self, done: MoveDone, now_ns: int) -> bool:
        """Take in the end of a move; False when it is none of ours."""
        write = self._writes.pop(done.move_id, None)
        if write is None:
            return bool(self._shelves) and self._onboards.land(done, now_ns)
        if done.error is not None:
            write.into.num_failed += len(write.names)
            write.into.resumes_ns = now_ns + REST_NS
        write.into.encode_ns += done.codec_ns
        pool = self._kv.groups[0].pool
        now = pool.generations(write.block_ids)
        changed = {
            name
            for name, before, after in zip(write.names, write.generations, now, strict=False)
            if before != after
        }
        self.num_missed += len(changed)
        for name, digest in zip(write.names, write.landed(done), strict=True):
            if done.error is None and name not in changed and digest != NO_DIGEST:
                write.into.finish(name, digest)
            else:
                write.into.num_failed += done.error is None and digest == NO_DIGEST
                write.into.abort(name)
            if write.out_of is not None:
                write.out_of.release(name)
                if name in write.out_of and not write.out_of.is_held(name):
                    write.out_of.drop(name, is_evicted=name not in write.into)
        return True

    def has(self, name: BlockHash) -> bool:
        """Tell whether a block can be brought back from a tier."""
        return any(name in shelf for shelf in self._shelves)

    def contents(self, tier: str) -> list[KeptBlock]:
        """Return all that is in a tier of ours. O(blocks)."""
        return [kept for shelf in self._shelves if shelf.name == tier for kept in shelf.contents()]

    def names(self) -> Iterator[BlockHash]:
        """Yield every block that can be brought back; twice if it is in two tiers."""
        for shelf in self._shelves:
            yield from shelf.names()

    def load(self) -> tuple[TierLoad, ...]:
        """Return what each tier has and did, nearest first."""
        return tuple(shelf.load() for shelf in self._shelves)

    def check(self) -> None:
        """Assert that the books balance."""
        self.residency.check()
        for shelf in self._shelves:
            shelf.check()

    # ------------------------------------------------------------------------------ going down

    def _note_parked(self, now_ns: int) -> None:
        """Queue the blocks that were let go and are not in the nearest tier.

        What was brought from a farther one was of use, and goes to the nearest as well.
        """
        is_of_use = self._has_prompts or bool(self._siblings)
        for name in self._parked:
            if is_of_use and self._is_wanted(name):
                self._pending[name] = None
            if name in self.residency:
                self.residency.touch(name, now_ns)
            for shelf in self._shelves:
                if name in shelf:
                    shelf.touch(name)
        self._parked.clear()

    def _tell_names(self) -> None:
        """Have the router hear of names that were here at the start, and that have left a tier."""
        for index, shelf in enumerate(self._shelves):
            if shelf.changes:
                self._news += [name for name in shelf.changes if name not in shelf]
                self._siblings.note_change(index, shelf.changes)
                shelf.changes.clear()
        cache = self._kv.groups[0].pool.prefix_cache
        if self._news and cache.changes is not None:
            for name in self._news:
                cache.changes[name] = self.has(name) or cache.find(name) is not None
        self._news.clear()

    def _offload(self, now_ns: int) -> list[Command]:
        """Write the blocks that have waited longest to the nearest tier that takes them."""
        shelves = self._shelves_for_next(self._writable(now_ns))
        if not shelves:
            return []
        commands = self._make_room(shelves, min(BLOCKS_MAX, len(self._pending)))
        names = self._take_pending(shelves[0])
        if not names:
            return commands
        # Kept in the order of being let go, so that a tier, too, gives a prefix up from its end.
        pool = self._kv.groups[0].pool
        found = [block_id for n in names if (block_id := pool.prefix_cache.find(n)) is not None]
        block_ids = tuple(found)
        write = _Write(
            names=names,
            digests=tuple(map(pool.digest, block_ids)),
            into=shelves[0],
            block_ids=block_ids,
            generations=pool.generations(block_ids),
        )
        return [*commands, self._submit(write, block_ids)]

    def _take_pending(self, into: Shelf) -> list[BlockHash]:
        """Take blocks that are still in the pool, with a digest to be known by, out of the line."""
        pool = self._kv.groups[0].pool
        names: list[BlockHash] = []
        others: list[BlockHash] = []
        for name in list(self._pending):
            if len(names) == min(into.num_free, BLOCKS_MAX):
                break
            del self._pending[name]
            if not into.takes(name):
                others.append(name)
                continue
            if self._is_kept(name, into):
                continue  # a sibling was quicker, or the nearest could not be written for a while
            block_id = pool.prefix_cache.find(name)
            if block_id is None:
                self.num_missed += 1
            elif pool.digest(block_id) != NO_DIGEST:
                names.append(name)
        self._pending.update(dict.fromkeys(others))
        return names

    def _make_room(self, shelves: Items[Shelf], wanted: int) -> list[Command]:
        """Free slots in the first shelf: what is below already is dropped, the rest sinks."""
        shelf, below = shelves[0], shelves[1:]
        wanted = min(wanted, shelf.num_slots) - shelf.num_free
        if wanted <= 0 or any(write.out_of is shelf for write in self._writes.values()):
            return []
        oldest = shelf.hold_oldest(wanted)
        sinking = [
            n for n in oldest if below and below[0].takes(n) and not self._is_kept(n, below[0])
        ]
        commands = self._make_room(below, len(sinking)) if sinking else []
        sinking = sinking[: below[0].num_free] if below else []
        for name in oldest:
            if name not in sinking:
                shelf.release(name)
                shelf.drop(name, is_evicted=not (below and self._is_kept(name, below[0])))
        if sinking:
            digests = tuple(map(shelf.digest, sinking))
            write = _Write(sinking, digests, into=below[0], out_of=shelf)
            commands.append(self._submit(write, [shelf.slot(name) for name in sinking]))
        return commands

    def _submit(self, write: _Write, sources: Items[BlockId]) -> Command:
        # In the order of where they lie: what is adjacent there is copied as one piece.
        order = sorted(range(len(sources)), key=sources.__getitem__)
        names = tuple(write.names[i] for i in order)
        slots = write.into.begin(names)
        move_id = self._move_ids.next()
        self._writes[move_id] = replace(write, order=tuple(order))
        move = Move(
            move_id=move_id,
            kind=MoveClass.OFFLOAD,
            request_id=NOBODY,
            source=self._config.worker_id,
            epoch=self._config.epoch,
            spans=(tuple(align([sources[i] for i in order], slots)),),
            digests=(tuple(write.digests[i] for i in order),),
            tiers=TierEnds(write.out_of.name if write.out_of else "", write.into.name, names),
        )
        return SubmitMove(move)

    def _is_wanted(self, name: BlockHash) -> bool:
        """Tell whether a tier is to have a block, and the nearest that takes it has not."""
        for shelf in self._shelves:
            if shelf.takes(name):
                return not self._is_kept(name, shelf)
        return False

    def _shelves_for_next(self, shelves: list[Shelf]) -> list[Shelf]:
        """Return those from the first on that takes what has waited longest; what none takes is
        forgotten.
        """
        for name in list(self._pending):
            for index, shelf in enumerate(shelves):
                if shelf.takes(name):
                    return shelves[index:]
            del self._pending[name]
        return []

    def _is_kept(self, name: BlockHash, shelf: Shelf) -> bool:
        """Tell whether a block is in a tier of this host already, or on its way to ours."""
        return shelf.knows(name) or self._siblings.find(name, shelf.name) is not None

    def _writable(self, now_ns: int) -> list[Shelf]:
        return [shelf for shelf in self._shelves if shelf.resumes_ns <= now_ns]
