"""`Siblings`: what the other workers of a host have in their tiers, as they say it themselves.

A worker owns its shelves alone: it hands out the slots and writes them. It tells its siblings in
batches which names lie in which slots with which digests, all of them when one comes up, and who
wants a block reads it out of the owner's memory or file without asking. Nothing is held for that: a
slot may have been given to another block meanwhile, and the digest of what was read shows it. Then
it is computed, as if the sibling had not had it. The reader tells the owner what was of use, so
that it is kept, and what was wrong: only the owner knows whether that is old news or a broken
block, and drops the latter.

What a sibling has said goes with it. Messages may be lost: that costs hits, or reads in vain.
Called by `worker/tiers.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Command, Send
from penstock.core.tiers import KeptBlock, ShelfChanged, ShelfUsed
from penstock.core.types import BlockHash, WorkerId
from penstock.worker.shelf import Shelf

NAMES_MAX: Final = 4096
"""In one message."""
EARLY_MAX: Final = 64
"""Messages of one worker that are kept until it is introduced."""


class SiblingShelf:
    """One tier of one incarnation of a sibling. `books` is our tier of that name: what is brought
    from here counts there, and is expected to take as long.
    """

    def __init__(self, books: Shelf, owner: WorkerId, epoch: int) -> None:
        self.name = books.name
        self.books = books
        self.owner = owner
        self.epoch = epoch
        self._there: dict[BlockHash, KeptBlock] = {}
        self._right: dict[BlockHash, None] = {}
        self._wrong: list[KeptBlock] = []

    def __contains__(self, name: BlockHash) -> bool:
        """Tell whether the sibling has named a block."""
        return name in self._there

    def __len__(self) -> int:
        return len(self._there)

    def locate(self, name: BlockHash) -> KeptBlock:
        """Return where a block is said to be, and what its digest has to be."""
        return self._there[name]

    def hold(self, names: Iterable[BlockHash]) -> None:
        """Hold nothing: the owner is not asked."""

    def release(self, name: BlockHash) -> None:
        """Hold nothing: the owner is not asked."""

    def confirm(self, name: BlockHash) -> None:
        """Note that a move has brought a block whole."""
        self.books.num_hits += 1
        self.books.num_shared += 1
        self._right[name] = None

    def reject(self, block: KeptBlock, *, is_read: bool) -> None:
        """Forget a block that was not what it was named, or could not be read."""
        self.books.num_stale += is_read
        self.books.num_failed += not is_read
        if self._there.get(block.name) == block:
            del self._there[block.name]
        if is_read:
            self._wrong.append(block)

    def hear(self, event: ShelfChanged) -> None:
        """Take in what the owner says of it."""
        if event.is_all:
            self._there.clear()
        for name in event.removed:
            self._there.pop(name, None)
        for block in event.stored:
            self._there[block.name] = block

    def take_report(self) -> ShelfUsed | None:
        """Return what the owner is to hear of, once."""
        if not self._right and not self._wrong:
            return None
        report = ShelfUsed(
            epoch=self.epoch,
            tier=self.name,
            right=tuple(self._right),
            wrong=tuple(self._wrong),
        )
        self._right.clear()
        self._wrong.clear()
        return report


class Siblings:
    """Who they are, what they have, and what they are to hear of ours."""

    def __init__(self, config: WorkerConfig, shelves: Sequence[Shelf]) -> None:
        self._config = config
        self._shelves = shelves
        self._shelves_of: dict[WorkerId, list[SiblingShelf]] = {}
        self._epochs: dict[WorkerId, int] = {}
        self._newcomers: dict[WorkerId, None] = {}
        # What was heard of workers that have not been introduced yet: nobody orders the two.
        self._early: dict[WorkerId, list[ShelfChanged]] = {}
        self._changes: list[dict[BlockHash, None]] = [{} for _ in shelves]
        self._interval_ns = config.names_interval_ns or 0
        self._sent_ns = -self._interval_ns

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self._epochs)

    def meet(self, info: WorkerInfo) -> None:
        """Take a worker in that can read our tiers, if it is one of this host and alike."""
        config = self._config
        is_alike = info.host == config.host and info.layout == config.layout
        if not self._shelves or not is_alike or not info.tiers:
            return
        alike = [(tier.name, tier.codec) for tier in info.tiers]
        self._epochs[info.worker_id] = info.epoch
        self._newcomers[info.worker_id] = None
        self._shelves_of[info.worker_id] = [
            SiblingShelf(shelf, info.worker_id, info.epoch)
            for shelf in self._shelves
            if (shelf.name, shelf.codec.name) in alike
        ]
        for event in self._early.pop(info.worker_id, []):
            self.hear(event)

    def forget(self, worker_id: WorkerId, epoch: int) -> None:
        """Forget an incarnation and all that it has said; a newer one is left alone."""
        if self._epochs.get(worker_id) == epoch:
            del self._epochs[worker_id], self._shelves_of[worker_id]
            self._newcomers.pop(worker_id, None)
        self._early.pop(worker_id, None)

    def hear(self, event: ShelfChanged) -> None:
        """Take in what a sibling says of one of its tiers; what a former incarnation says is not
        heard.
        """
        if not self._shelves:
            return
        if event.worker_id not in self._epochs:
            early = self._early.setdefault(event.worker_id, [])
            if len(early) < EARLY_MAX:
                early.append(event)
            return
        if self._epochs[event.worker_id] != event.epoch:
            return
        for shelf in self._shelves_of[event.worker_id]:
            if shelf.name == event.tier:
                shelf.hear(event)

    def find(self, name: BlockHash, tier: str) -> SiblingShelf | None:
        """Return a sibling's tier of that name which has a block. O(siblings)."""
        for shelf in self._all():
            if shelf.name == tier and name in shelf:
                return shelf
        return None

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return what is to be said now."""
        commands: list[Command] = [
            Send(shelf.owner, report) for shelf in self._all() if (report := shelf.take_report())
        ]
        commands += self._greet()
        if is_idle or now_ns - self._sent_ns >= self._interval_ns:
            commands += self._tell_changes(now_ns)
        return commands

    def note_change(self, index: int, names: Iterable[BlockHash]) -> None:
        """Note that these came to shelf number `index`, or went."""
        if self._epochs:
            self._changes[index].update(dict.fromkeys(names))

    def _all(self) -> Iterator[SiblingShelf]:
        for shelves in self._shelves_of.values():
            yield from shelves

    def _greet(self) -> list[Command]:
        """Tell those that are new all there is."""
        newcomers, self._newcomers = self._newcomers, {}
        commands: list[Command] = []
        for shelf in self._shelves if newcomers else ():
            stored = shelf.contents()
            messages = self._messages(shelf, stored, [], is_all=True)
            commands += [Send(to, message) for to in newcomers for message in messages]
        return commands

    def _tell_changes(self, now_ns: int) -> list[Command]:
        commands: list[Command] = []
        for shelf, changes in zip(self._shelves, self._changes, strict=True):
            if not changes:
                continue
            self._sent_ns = now_ns
            stored = [shelf.locate(name) for name in changes if name in shelf]
            removed = [name for name in changes if name not in shelf]
            changes.clear()
            messages = self._messages(shelf, stored, removed)
            commands += [Send(to, message) for to in self._epochs for message in messages]
        return commands

    def _messages(
        self,
        shelf: Shelf,
        stored: list[KeptBlock],
        removed: list[BlockHash],
        *,
        is_all: bool = False,
    ) -> list[ShelfChanged]:
        num_names = max(len(stored), len(removed), 1)
        return [
            ShelfChanged(
                worker_id=self._config.worker_id,
                epoch=self._config.epoch,
                tier=shelf.name,
                stored=tuple(stored[start : start + NAMES_MAX]),
                removed=tuple(removed[start : start + NAMES_MAX]),
                is_all=is_all and not start,
            )
            for start in range(0, num_names, NAMES_MAX)
        ]
