"""The prefix index against sets of names per worker, through every order of events."""

import random
from collections.abc import Iterator
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.control.prefix_index import (
    DEAD_SLOTS_MAX,
    Known,
    PrefixIndex,
    slots_of,
    walk_names,
)
from penstock.core.block import extend_hashes, root_hash
from penstock.core.types import BlockHash

SIZE = 4


def chain(token_ids: list[int], salt: str = "") -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, token_ids, SIZE, salt)
    return hashes


def prompt(kind: int, num_blocks: int) -> list[int]:
    """Prompts of one kind are prefixes of each other; kinds share their first two blocks."""
    rng = random.Random(kind)
    return ([7] * 2 * SIZE + [rng.randrange(1000) for _ in range(200 * SIZE)])[: num_blocks * SIZE]


def found(index: PrefixIndex, token_ids: list[int], salt: str = "") -> list[int]:
    """Of a prompt with one token more, which is to be computed in any case."""
    return index.tokens([*token_ids, 1], SIZE, root_hash(salt)).tolist()


def test_every_worker_gets_its_own_longest_prefix() -> None:
    index = PrefixIndex()
    slots = [index.add_worker() for _ in range(4)]
    names = chain(prompt(1, 100))
    for slot, length in zip(slots, (0, 3, 64, 100), strict=True):
        index.apply(slot, names[:length])
    assert found(index, prompt(1, 100)) == [0, 3 * SIZE, 64 * SIZE, 100 * SIZE]
    assert found(index, prompt(1, 10)) == [0, 3 * SIZE, 10 * SIZE, 10 * SIZE]
    assert found(index, [*prompt(1, 64), 1, 2]) == [0, 3 * SIZE, 64 * SIZE, 64 * SIZE]
    assert found(index, prompt(2, 100)) == [0, 2 * SIZE, 2 * SIZE, 2 * SIZE]
    assert found(index, prompt(1, 100), salt="another tenant") == [0, 0, 0, 0]


def test_a_name_that_is_removed_ends_the_prefix() -> None:
    index = PrefixIndex()
    slot = index.add_worker()
    names = chain(prompt(1, 20))
    index.apply(slot, names)
    index.apply(slot, (), names[13:])
    assert found(index, prompt(1, 20)) == [13 * SIZE]
    index.apply(slot, (), names)
    assert index.num_blocks == 0


def test_the_blocks_of_a_restarted_worker_vanish_at_once() -> None:
    index = PrefixIndex()
    first, other = index.add_worker(), index.add_worker()
    for slot in (first, other):
        index.apply(slot, chain(prompt(1, 20)))
    index.drop_worker(first)
    again = index.add_worker()
    assert again != first
    hits = found(index, prompt(1, 20))
    assert [hits[slot] for slot in (first, other, again)] == [0, 20 * SIZE, 0]


def test_slots_are_used_again_once_their_bits_are_swept_out() -> None:
    index = PrefixIndex()
    names = chain(prompt(1, 20))
    for _ in range(10 * DEAD_SLOTS_MAX):
        slot = index.add_worker()
        assert found(index, prompt(1, 20))[slot] == 0
        index.apply(slot, names)
        index.drop_worker(slot)
        index.check()
    assert index.num_slots <= DEAD_SLOTS_MAX + 1


def test_memory_is_bounded_and_what_is_in_use_stays() -> None:
    index = PrefixIndex(blocks_max=1000)
    slot = index.add_worker()
    hot = prompt(1, 20)
    index.apply(slot, chain(hot))
    for kind in range(2, 100):
        index.apply(slot, chain(prompt(kind, 100)))
        assert index.num_blocks <= 1000 + 100
        assert found(index, hot[: 2 * SIZE]) == [2 * SIZE]
        index.check()
    assert found(index, prompt(2, 100)) == [2 * SIZE]  # the rest of it is long forgotten
    assert found(index, prompt(99, 100)) == [100 * SIZE]


def names_of(blocks: Iterator[tuple[BlockHash, ...]]) -> list[BlockHash]:
    return [name for names in blocks for name in names]


def test_names_are_those_that_workers_give() -> None:
    token_ids = [*prompt(1, 37), 1, 2]
    known: Known = {}
    for _ in range(2):
        blocks = walk_names(token_ids, SIZE, root_hash("tenant"), known)
        assert names_of(blocks) == chain(token_ids, "tenant")
    other = [*token_ids[:-40], 5, *token_ids[-39:]]
    for salt in ("tenant", "another"):
        blocks = walk_names(other, SIZE, root_hash(salt), known)
        assert names_of(blocks) == chain(other, salt)
    assert known


def test_only_what_somebody_has_is_hashed() -> None:
    index = PrefixIndex()
    index.apply(index.add_worker(), chain(prompt(1, 40)))

    walked: list[BlockHash] = []

    def walk(token_ids: list[int]) -> Iterator[tuple[BlockHash, ...]]:
        for names in walk_names(token_ids, SIZE, root_hash(""), {}):
            walked.extend(names)
            yield names

    for token_ids, expected in (([5] * 1000 * SIZE, 1), (prompt(1, 200), 41)):
        walked.clear()
        index.levels(walk(token_ids))
        assert len(walked) == expected


def test_the_last_token_is_never_found() -> None:
    index = PrefixIndex()
    index.apply(index.add_worker(), chain(prompt(1, 20)))
    assert index.tokens(prompt(1, 20), SIZE, root_hash("")).tolist() == [20 * SIZE - 1]
    assert index.tokens(prompt(1, 21), SIZE, root_hash("")).tolist() == [20 * SIZE]


def test_the_ends_of_a_known_chunk_tell_what_is_between() -> None:
    index = PrefixIndex()
    slots = [index.add_worker() for _ in range(4)]
    names = chain(prompt(1, 64))
    for slot, length in zip(slots, (64, 31, 12, 8), strict=True):
        index.apply(slot, names[:length])
    for _ in range(2):  # what was walked once is known from then on
        assert found(index, prompt(1, 64)) == [64 * SIZE, 31 * SIZE, 12 * SIZE, 8 * SIZE]
    index.apply(slots[1], names[31:])
    index.apply(slots[3], (), names[5:8])
    assert found(index, prompt(1, 64)) == [64 * SIZE, 64 * SIZE, 12 * SIZE, 5 * SIZE]
    looked_up = []

    class Watched(dict[BlockHash, int]):
        def get(self, name: BlockHash, default: int | None = None) -> int | None:  # type: ignore[override]
            looked_up.append(name)
            return super().get(name, default)

    index._young = Watched(index._young)
    assert found(index, prompt(1, 64))[0] == 64 * SIZE
    assert len(looked_up) < 64 / 2


def test_who_asks_again_hears_the_same_until_something_changes() -> None:
    index, token_ids = PrefixIndex(), [*prompt(1, 20), 1]
    names = chain(token_ids)

    def ask() -> list[float]:
        tokens = index.tokens(token_ids, SIZE, root_hash(""))
        assert index.tokens(token_ids, SIZE, root_hash("")) is tokens
        assert index.tokens(token_ids, SIZE, root_hash("another")).tolist() == [0] * len(tokens)
        return tokens.tolist()

    slot = index.add_worker()
    assert ask() == [0]
    index.apply(slot, names)
    assert ask() == [20 * SIZE]
    index.apply(slot, (), names[13:])
    assert ask() == [13 * SIZE]
    index.add_worker()
    assert ask() == [13 * SIZE, 0]
    index.drop_worker(slot)
    assert ask() == [0, 0]


@pytest.mark.parametrize("slots", [[0], [3], [63, 64], [1, 999], list(range(0, 1000, 7))])
def test_slots_of_a_set_of_workers(slots: list[int]) -> None:
    assert slots_of(sum(1 << slot for slot in slots)).tolist() == slots


class Model(RuleBasedStateMachine):
    """Workers that store and drop whole prefixes, die and come back."""

    kinds: ClassVar = st.integers(0, 3)
    lengths: ClassVar = st.integers(0, 90)
    picks: ClassVar = st.integers(0, 1000)

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.names: dict[int, set[BlockHash]] = {}

    def pick(self, number: int) -> int | None:
        slots = sorted(self.names)
        return slots[number % len(slots)] if slots else None

    @rule()
    def join(self) -> None:
        slot = self.index.add_worker()
        assert slot not in self.names
        self.names[slot] = set()

    @rule(number=picks)
    def die(self, number: int) -> None:
        slot = self.pick(number)
        if slot is not None:
            self.index.drop_worker(slot)
            del self.names[slot]

    @rule(number=picks, kind=kinds, length=lengths)
    def store(self, number: int, kind: int, length: int) -> None:
        slot = self.pick(number)
        if slot is not None:
            names = chain(prompt(kind, length))
            self.index.apply(slot, names)
            self.names[slot].update(names)

    @rule(number=picks, kind=kinds, length=st.integers(2, 90))
    def give_up(self, number: int, kind: int, length: int) -> None:
        """From the end, as caches do, and never what another kind shares."""
        slot = self.pick(number)
        if slot is not None:
            names = chain(prompt(kind, 200))[length:]
            self.index.apply(slot, (), names)
            self.names[slot].difference_update(names)

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        for kind in range(4):
            names = chain(prompt(kind, 95))
            hits = found(self.index, prompt(kind, 95))
            for slot, own in self.names.items():
                length = next((i for i, name in enumerate(names) if name not in own), len(names))
                assert hits[slot] == length * SIZE, (slot, kind)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
