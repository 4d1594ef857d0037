"""Residency: bytes are conserved whatever is done, and it is known when a block was used."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.kv.residency import Residency
from penstock.kv.tiers import RAW, CodecSpec, Tier, TierSpec

CAPACITY = {Tier.HBM: 100, Tier.DRAM: 250}


def codec(name: str, num_bytes: int) -> CodecSpec:
    return CodecSpec(name=name, block_bytes=num_bytes, decode_ns=0 if name == RAW else 7)


def make() -> Residency:
    return Residency(TierSpec(tier=tier, capacity_bytes=size) for tier, size in CAPACITY.items())


def test_room_is_taken_when_a_copy_begins_to_arrive():
    residency = make()
    assert residency.begin("a", Tier.HBM, codec(RAW, 60), 0)
    assert not residency.begin("b", Tier.HBM, codec(RAW, 60), 0)
    assert residency.used_bytes(Tier.HBM) == 60
    assert not residency.is_present("a", Tier.HBM)
    residency.abort("a", Tier.HBM)
    assert residency.begin("b", Tier.HBM, codec(RAW, 60), 0)
    residency.finish("b", Tier.HBM)
    assert residency.is_present("b", Tier.HBM)
    assert "a" not in residency


def test_a_block_lies_in_several_tiers_and_is_forgotten_with_its_last_copy():
    residency = make()
    residency.add("a", Tier.HBM, codec(RAW, 60), 0)
    residency.add("a", Tier.DRAM, codec("int8", 30), 0)
    assert [copy.codec for copy in residency.present("a")] == [RAW, "int8"]
    assert residency.num_copies("a") == 2
    residency.drop("a", Tier.HBM)
    assert residency.free_bytes(Tier.HBM) == 100
    assert "a" in residency
    residency.drop("a", Tier.DRAM)
    assert len(residency) == 0


def test_what_is_held_cannot_be_dropped():
    residency = make()
    residency.add("a", Tier.HBM, codec(RAW, 60), 0)
    residency.hold("a", Tier.HBM)
    with pytest.raises(AssertionError, match="held"):
        residency.drop("a", Tier.HBM)
    residency.release("a", Tier.HBM)
    residency.drop("a", Tier.HBM)


def test_a_use_is_remembered_as_long_as_the_block_is_anywhere():
    residency = make()
    residency.add("a", Tier.HBM, codec(RAW, 1), 0)
    assert residency.idle_ns("a", 50) is None
    residency.touch("a", 60)
    assert residency.idle_ns("a", 100) == 40
    residency.drop("a", Tier.HBM)
    residency.add("a", Tier.DRAM, codec("int8", 1), 0)
    assert residency.idle_ns("a", 100) is None
    copy = residency.copy("a", Tier.DRAM)
    assert (copy.codec, copy.decode_ns) == ("int8", 7)


KEYS = st.integers(0, 5)
TIERS = st.sampled_from(list(CAPACITY))


class ResidencyMachine(RuleBasedStateMachine):
    """Random copies, holds and drops beside a plain dict of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = make()
        self.sizes: dict[tuple[int, Tier], int] = {}
        self.arriving: set[tuple[int, Tier]] = set()
        self.holds: dict[tuple[int, Tier], int] = {}

    @rule(key=KEYS, tier=TIERS, num_bytes=st.integers(1, 120))
    def begin(self, key, tier, num_bytes):
        if (key, tier) in self.sizes:
            return
        used = sum(size for (_, t), size in self.sizes.items() if t is tier)
        fits = used + num_bytes <= CAPACITY[tier]
        assert self.residency.begin(key, tier, codec(RAW, num_bytes), 0) == fits
        if fits:
            self.sizes[key, tier] = num_bytes
            self.arriving.add((key, tier))

    @precondition(lambda self: self.arriving)
    @rule(data=st.data(), is_finished=st.booleans())
    def end(self, data, is_finished):
        place = data.draw(st.sampled_from(sorted(self.arriving, key=str)))
        self.arriving.remove(place)
        if is_finished:
            self.residency.finish(*place)
            self.holds[place] = 0
        else:
            self.residency.abort(*place)
            del self.sizes[place]

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def hold(self, data):
        place = data.draw(st.sampled_from(sorted(self.holds, key=str)))
        self.residency.hold(*place)
        self.holds[place] += 1

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release_or_drop(self, data):
        place = data.draw(st.sampled_from(sorted(self.holds, key=str)))
        if self.holds[place]:
            self.residency.release(*place)
            self.holds[place] -= 1
        else:
            self.residency.drop(*place)
            del self.holds[place], self.sizes[place]

    @invariant()
    def bytes_are_conserved(self):
        self.residency.check()
        for tier in CAPACITY:
            used = sum(size for (_, t), size in self.sizes.items() if t is tier)
            assert self.residency.used_bytes(tier) == used
        for key in range(6):
            present = {copy.tier for copy in self.residency.present(key)}
            assert present == {tier for k, tier in self.holds if k == key}


TestResidencyMachine = ResidencyMachine.TestCase
