"""`TierDesk`: the tiers below a worker's pool: what goes down, and when.

A block that nobody holds any more is hot, warm or cold (`worker/keeping.py`), and written to the
nearest tier at once, to it before the pool gives it up, or to the farthest while nobody is
disturbed by that, if at all (`worker/lines.py`). Nothing is held for it: when a block was handed
out anew before its copy ended, its generation says so, and the copy is void. What a tier gives up
for others sinks to where it is worth most, or is dropped, by the same costs. What a sibling has in
a tier of the same name is not written once more: a host keeps one copy, and every worker of it
reads it there.

Reading back is `worker/onboard.py`'s, slots are `worker/shelf.py`'s, what others have is
`worker/siblings.py`'s. A worker that has no sibling and is never assigned a prompt would write for
nobody, and does not. Without tiers every method returns at once. Called by the worker core.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Command, Move, MoveClass, MoveDone, SubmitMove, TierEnds, WakeAt
from penstock.core.tiers import KeptBlock, PrefetchLoad, ShelfChanged, ShelfUsed, TierLoad
from penstock.core.types import NO_DIGEST, NS_PER_S, BlockHash, BlockId, WorkerId
from penstock.kv.cache import KVCache
from penstock.kv.compression import Direction
from penstock.kv.policy import Temperature
from penstock.kv.residency import Residency
from penstock.kv.reuse import ReuseHistory
from penstock.kv.tiers import Tier, TierSpec
from penstock.transfer.plan import align
from penstock.worker.costs import TierCosts
from penstock.worker.fetches import Fetches
from penstock.worker.keeping import Keeping
from penstock.worker.lines import Lines, roomy
from penstock.worker.numbers import Numbers
from penstock.worker.onboard import NOBODY, OnboardDesk
from penstock.worker.scheduler import Scheduler
from penstock.worker.sequence import Sequence
from penstock.worker.shelf import Shelf, takers_of
from penstock.worker.siblings import Siblings
from penstock.worker.traffic import Traffic
from penstock.worker.write import Write

BLOCKS_MAX: Final = 64
"""In one move down: what is to come up meanwhile waits no longer than that takes."""
REST_NS: Final = 10 * NS_PER_S
"""A tier that could not be written is left alone for so long."""
WRITE_NS: Final = NS_PER_S
"""By when a write should be done, from when it was asked for."""
TIERS_KEY: Final = "tiers"


class TierDesk:
    """Owns the shelves, nearest first, and the moves down."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        scheduler: Scheduler,
        traffic: Traffic,
        move_ids: Numbers,
    ) -> None:
        self.num_missed = 0
        """Blocks that the pool had overwritten before they were copied."""
        self._config = config
        self._kv = kv
        self._scheduler = scheduler
        self._move_ids = move_ids
        self._shelves: list[Shelf] = []
        self._woken_ns = 0
        self._writes: dict[int, Write] = {}
        self._has_prompts = False
        self.residency = Residency(())
        self._parked: list[BlockHash] = []
        self._news: list[BlockHash] = []
        if config.tiers and config.is_prefix_caching:
            self._open_tiers()
        self._siblings = Siblings(config, self._shelves)
        self._costs = TierCosts(config, traffic)
        num_slots = sum(shelf.num_slots for shelf in self._shelves)
        history = ReuseHistory(kv.groups[0].pool.num_blocks + num_slots)
        self._keeping = Keeping(history, kv.retention, self._costs, self.residency)
        self._lines = Lines(self._keeping)
        fetches = Fetches(config, kv, self._shelves, self._siblings, traffic, move_ids)
        self._fetches = fetches
        self._onboards = OnboardDesk(config, kv, scheduler, fetches, self._costs, traffic)

    def _open_tiers(self) -> None:
        (block_bytes,) = self._config.layout.block_bytes
        specs = [
            TierSpec(tier=Tier(t.name), capacity_bytes=t.num_slots * (t.slot_bytes or block_bytes))
            for t in self._config.tiers
        ]
        self.residency = Residency(specs)
        self._shelves = [
            Shelf(tier, self.residency, block_bytes, self._kv.retention)
            for tier in self._config.tiers
        ]
        self._kv.groups[0].pool.prefix_cache.parked = self._parked
        self._news = [kept.name for tier in self._config.tiers for kept in tier.kept]

    @property
    def num_fetches(self) -> int:
        """Fetches under way; each holds blocks of the pool."""
        return len(self._fetches.active)

    @property
    def shelves(self) -> Items[Shelf]:
        """The tiers, nearest first."""
        return self._shelves

    @property
    def onboarding(self) -> list[BlockId]:
        """Blocks of the pool that are being filled from tiers."""
        return self._fetches.filling

    def add(self, sequence: Sequence, now_ns: int) -> None:
        """Take a new sequence in: it goes to the scheduler, at once or with its prefix brought."""
        if not self._shelves:
            self._scheduler.add(sequence)
            return
        self._has_prompts = True
        sequence.name_blocks(self._config.layout.block_size)
        for name in sequence.hashes:
            self._keeping.history.use(name)
        self._onboards.add(sequence, now_ns)

    def bring(self, now_ns: int) -> None:
        """Begin to bring what it is time for; who waits for nothing any more goes on."""
        if self._shelves:
            self._onboards.bring(now_ns)

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
        for name in event.right if self._shelves else ():
            self._keeping.history.use(name)
        for shelf in self._shelves if event.epoch == self._config.epoch else ():
            if shelf.name == event.tier:
                shelf.hear(event)

    def note_step(self, num_tokens: int, took_ns: int) -> None:
        """Remember what computing costs."""
        if self._shelves:
            self._costs.note_step(num_tokens, took_ns)

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return the moves that are to begin now."""
        if not self._shelves:
            return []
        commands = self._onboards.take_commands()
        self._keeping.forget_costs()
        self._note_parked(now_ns, is_idle=is_idle)
        self._tell_names()
        pool = self._kv.groups[0].pool
        line, is_cold = self._lines.due(
            is_idle=is_idle, is_short=2 * pool.num_free < pool.num_blocks
        )
        if line and not any(write.out_of is None for write in self._writes.values()):
            writable = [shelf for shelf in self._shelves if shelf.resumes_ns <= now_ns]
            # What no tier takes now is forgotten; the first of the rest says which it is to be.
            for name in [name for name in line if not takers_of(name, writable)]:
                del line[name]
            if line:
                shelves = takers_of(next(iter(line)), writable)
                shelves = shelves[shelves.index(roomy(shelves)) :] if is_cold else shelves
                commands += self._offload(line, shelves, now_ns, is_idle=is_idle)
        at_ns = self._onboards.prefetch.next_ns()
        if at_ns is not None and at_ns > now_ns and at_ns != self._woken_ns:
            self._woken_ns = at_ns
            commands.append(WakeAt(at_ns, TIERS_KEY))
        return commands + self._siblings.due(now_ns, is_idle=is_idle)

    def land(self, done: MoveDone, now_ns: int) -> bool:
        """Take in the end of a move; False when it is none of ours."""
        write = self._writes.pop(done.move_id, None)
        if write is None:
            return bool(self._shelves) and self._onboards.land(done, now_ns)
        if done.error is not None:
            write.into.num_failed += len(write.names)
            write.into.resumes_ns = now_ns + REST_NS
        if done.codec_ns:
            write.into.codec_books.note(
                Direction.ENCODE, done.codec_ns, num_blocks=len(write.names)
            )
        pool = self._kv.groups[0].pool
        now = pool.generations(write.block_ids)
        changed = {
            name
            for name, before, after in zip(write.names, write.generations, now, strict=False)
            if before != after
        }
        self.num_missed += len(changed)
        for name, digest in write.landed(done).items():
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

    def temperature(self, name: BlockHash) -> Temperature:
        """Return how warm a block is: cold where no tier takes it, since it is dropped then."""
        takers = takers_of(name, self._shelves)
        return self._keeping.temperature(name, takers[0].tier) if takers else Temperature.COLD

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

    def prefetches(self) -> PrefetchLoad | None:
        """Return what came of the wishes; None without tiers."""
        return self._onboards.load() if self._shelves else None

    def check(self) -> None:
        """Assert that the books balance."""
        self.residency.check()
        for shelf in self._shelves:
            shelf.check()

    # ------------------------------------------------------------------------------ going down

    def _note_parked(self, now_ns: int, *, is_idle: bool) -> None:
        """Queue the blocks that were let go and are worth having in a tier.

        What was brought from a farther one was of use, and goes to the nearest as well.
        """
        is_of_use = self._has_prompts or bool(self._siblings)
        for name in self._parked:
            # A prompt's blocks were used when it came; who is given none uses what others computed.
            if not self._has_prompts or name not in self._keeping.history:
                self._keeping.history.use(name)
            takers = takers_of(name, self._shelves) if is_of_use else []
            if takers and not self._is_kept(name, takers[0]):
                self._lines.put(name, takers, is_idle=is_idle)
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

    def _offload(
        self, line: dict[BlockHash, None], shelves: list[Shelf], now_ns: int, *, is_idle: bool
    ) -> list[Command]:
        """Write the blocks that have waited longest to the first of some tiers."""
        wanted = min(BLOCKS_MAX, len(line))
        commands = self._make_room(shelves, wanted, now_ns, is_idle=is_idle)
        names = self._take_pending(line, shelves[0])
        if not names:
            return commands
        # Kept in the order of being let go, so that a tier, too, gives a prefix up from its end.
        pool = self._kv.groups[0].pool
        found = [block_id for n in names if (block_id := pool.prefix_cache.find(n)) is not None]
        block_ids = tuple(found)
        write = Write(
            names=names,
            digests=tuple(map(pool.digest, block_ids)),
            into=shelves[0],
            block_ids=block_ids,
            generations=pool.generations(block_ids),
        )
        return [*commands, self._submit(write, block_ids, now_ns)]

    def _take_pending(self, line: dict[BlockHash, None], into: Shelf) -> list[BlockHash]:
        """Take blocks that are still in the pool, with a digest to be known by, out of the line."""
        pool = self._kv.groups[0].pool
        names: list[BlockHash] = []
        for name in list(line):
            if len(names) == min(into.num_free, BLOCKS_MAX):
                break
            if not into.takes(name):
                continue
            del line[name]
            if self._is_kept(name, into):
                continue  # a sibling was quicker, or the nearest could not be written for a while
            block_id = pool.prefix_cache.find(name)
            if block_id is None:
                self.num_missed += 1
            elif pool.digest(block_id) != NO_DIGEST:
                names.append(name)
        return names

    def _make_room(
        self, shelves: Items[Shelf], wanted: int, now_ns: int, *, is_idle: bool
    ) -> list[Command]:
        """Free slots in the first shelf: what is worth it sinks to a lower one, the rest goes."""
        shelf, below = shelves[0], shelves[1:]
        wanted = min(wanted, shelf.num_slots) - shelf.num_free
        if wanted <= 0 or any(write.out_of is shelf for write in self._writes.values()):
            return []
        oldest = shelf.hold_oldest(wanted)
        goes_to = {name: self._sinks_to(name, shelf, below, is_idle=is_idle) for name in oldest}
        commands: list[Command] = []
        for index, lower in enumerate(below):
            sinking = [name for name in oldest if goes_to[name] is lower.tier]
            if not sinking:
                continue
            commands += self._make_room(below[index:], len(sinking), now_ns, is_idle=is_idle)
            for name in sinking[lower.num_free :]:
                goes_to[name] = None
            if sinking := sinking[: lower.num_free]:
                digests = tuple(map(shelf.digest, sinking))
                write = Write(sinking, digests, into=lower, out_of=shelf)
                slots = [shelf.slot(name) for name in sinking]
                commands.append(self._submit(write, slots, now_ns))
        for name in oldest:
            if goes_to[name] is None:
                shelf.release(name)
                is_below = any(self._is_kept(name, lower) for lower in below)
                shelf.drop(name, is_evicted=not is_below)
        return commands

    def _sinks_to(
        self, name: BlockHash, shelf: Shelf, below: Items[Shelf], *, is_idle: bool
    ) -> Tier | None:
        """Return where a block that a shelf gives up is to go; None: nowhere, or it is there."""
        if any(self._is_kept(name, lower) for lower in below):
            return None
        below = takers_of(name, below)
        tiers = [lower.tier for lower in below]
        place = self._keeping.lower(name, shelf.tier, tiers, is_idle=is_idle)
        for lower in below if place is None else ():
            lower.num_declined += 1
        return place

    def _submit(self, write: Write, sources: Items[BlockId], now_ns: int) -> Command:
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
        return SubmitMove(move, now_ns + WRITE_NS)

    def _is_kept(self, name: BlockHash, shelf: Shelf) -> bool:
        """Tell whether a block is in a tier of this host already, or on its way to ours."""
        return shelf.knows(name) or self._siblings.find(name, shelf.name) is not None
