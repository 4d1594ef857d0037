"""Residency tracker: where every block is, in which codec, since when unused, what is on its way.

A block has at most one copy per tier. A copy is *present*, or *arriving* while a transfer writes
it; room is taken when it starts to arrive, so a tier never holds more than its capacity. A copy
that a transfer reads, or that somebody pinned, is *held* and cannot be dropped.

It owns bytes and recency. It knows neither links nor when something should move: that is
`kv/orchestrator.py`'s, its caller. Addresses are byte offsets within a tier, used to find
neighbours; who hands them out is the tier's own affair. How likely a block is to be
used again is `kv/reuse.py`'s, and what follows from it `kv/policy.py`'s.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from penstock.kv.tiers import BlockKey, CodecSpec, Tier, TierSpec


@dataclass(slots=True, eq=False)
class Copy:
    """One copy of a block. `decode_ns` is what its codec takes to give the block back, beside the
    copy; `num_holds` counts transfers that read it and pins.
    """

    tier: Tier
    codec: str
    num_bytes: int
    address: int
    is_present: bool
    decode_ns: int = 0
    num_holds: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    copies: dict[Tier, Copy] = field(default_factory=dict)
    last_use_ns: int | None = None


class Residency:
    """All copies of all blocks, and the bytes that they take per tier."""

    def __init__(self, tiers: Iterable[TierSpec]) -> None:
        self.capacity_bytes: Mapping[Tier, int] = {t.tier: t.capacity_bytes for t in tiers}
        self._used_bytes = dict.fromkeys(self.capacity_bytes, 0)
        self._entries: dict[BlockKey, _Entry] = {}

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def used_bytes(self, tier: Tier) -> int:
        """Return the bytes of present and arriving copies."""
        return self._used_bytes[tier]

    def free_bytes(self, tier: Tier) -> int:
        """Return the bytes that may still be taken."""
        return self.capacity_bytes[tier] - self._used_bytes[tier]

    def copy(self, key: BlockKey, tier: Tier) -> Copy | None:
        """Return the copy in a tier, present or arriving."""
        entry = self._entries.get(key)
        return entry.copies.get(tier) if entry else None

    def is_present(self, key: BlockKey, tier: Tier) -> bool:
        """Tell whether a tier holds a whole copy."""
        copy = self.copy(key, tier)
        return copy is not None and copy.is_present

    def present(self, key: BlockKey) -> list[Copy]:
        """Return the copies that can be read now."""
        entry = self._entries.get(key)
        return [copy for copy in entry.copies.values() if copy.is_present] if entry else []

    def num_copies(self, key: BlockKey) -> int:
        """Return in how many tiers the block is or will be."""
        entry = self._entries.get(key)
        return len(entry.copies) if entry else 0

    # ------------------------------------------------------------------------------ copies

    def add(self, key: BlockKey, tier: Tier, codec: CodecSpec, address: int) -> bool:
        """Note a copy that is there already; False, and nothing noted, when the tier is full."""
        if not self.begin(key, tier, codec, address):
            return False
        self.finish(key, tier)
        return True

    def begin(self, key: BlockKey, tier: Tier, codec: CodecSpec, address: int) -> bool:
        """Take room for a copy that is about to arrive; False when the tier is full."""
        if codec.block_bytes > self.free_bytes(tier):
            return False
        entry = self._entries.setdefault(key, _Entry())
        assert tier not in entry.copies, f"{key!r} has a copy in {tier} already"
        entry.copies[tier] = Copy(
            tier,
            codec.name,
            codec.block_bytes,
            address,
            is_present=False,
            decode_ns=codec.decode_ns,
        )
        self._used_bytes[tier] += codec.block_bytes
        return True

    def finish(self, key: BlockKey, tier: Tier) -> None:
        """Note that an arriving copy is whole."""
        copy = self._entries[key].copies[tier]
        assert not copy.is_present, f"{key!r} has arrived in {tier} before"
        copy.is_present = True

    def abort(self, key: BlockKey, tier: Tier) -> None:
        """Give the room of an arriving copy back: it failed or was cancelled."""
        assert not self._entries[key].copies[tier].is_present, f"{key!r} has arrived in {tier}"
        self._forget(key, tier)

    def drop(self, key: BlockKey, tier: Tier) -> None:
        """Give a present copy up. The block is forgotten with its last copy."""
        copy = self._entries[key].copies[tier]
        assert copy.is_present, f"{key!r} is still arriving in {tier}"
        assert not copy.num_holds, f"{key!r} in {tier} is held {copy.num_holds} times"
        self._forget(key, tier)

    def hold(self, key: BlockKey, tier: Tier) -> None:
        """Keep a present copy from being dropped, until `release` as often."""
        copy = self._entries[key].copies[tier]
        assert copy.is_present, f"{key!r} is not yet in {tier}"
        copy.num_holds += 1

    def release(self, key: BlockKey, tier: Tier) -> None:
        """Undo one `hold`."""
        copy = self._entries[key].copies[tier]
        assert copy.num_holds > 0, f"{key!r} in {tier} is not held"
        copy.num_holds -= 1

    def _forget(self, key: BlockKey, tier: Tier) -> None:
        entry = self._entries[key]
        self._used_bytes[tier] -= entry.copies.pop(tier).num_bytes
        if not entry.copies:
            del self._entries[key]

    # ------------------------------------------------------------------------------ recency

    def touch(self, key: BlockKey, now_ns: int) -> None:
        """Note a use."""
        self._entries[key].last_use_ns = now_ns

    def idle_ns(self, key: BlockKey, now_ns: int) -> int | None:
        """Return the time since the block was used; None if it never was."""
        last_use_ns = self._entries[key].last_use_ns
        return None if last_use_ns is None else now_ns - last_use_ns

    # ------------------------------------------------------------------------------ the books

    def check(self) -> None:
        """Assert that bytes are conserved: those of all copies are in use, within capacity."""
        sums = dict.fromkeys(self.capacity_bytes, 0)
        for key, entry in self._entries.items():
            assert entry.copies, f"{key!r} is known and nowhere"
            for tier, copy in entry.copies.items():
                assert copy.tier == tier
                assert copy.num_holds == 0 or copy.is_present, f"{key!r} is read while it arrives"
                sums[tier] += copy.num_bytes
        assert sums == self._used_bytes, (sums, self._used_bytes)
        for tier, used_bytes in sums.items():
            assert 0 <= used_bytes <= self.capacity_bytes[tier], (tier, used_bytes)
