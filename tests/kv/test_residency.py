"""Residency: bytes are conserved whatever is done, and temperature follows use."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.kv.residency import Residency, Temperature
from penstock.kv.tiers import RAW, CodecSpec, Tier, TierSpec

CAPACITY = {Tier.HBM: 100, Tier.DRAM: 250}


def codec(name: str, num_bytes: int) -> CodecSpec:
    return CodecSpec(name=name, block_bytes=num_bytes, decode_ns=0 if name == RAW else 7)


def make(**settings) -> Residency:
    specs = [TierSpec(tier=tier, capacity_bytes=size) for tier, size in CAPACITY.items()]
    return Residency(specs, **settings)


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


def test_temperature_by_recency():
    residency = make(hot_ns=10, warm_ns=100)
    residency.add("a", Tier.HBM, codec(RAW, 1), 0)
    assert residency.temperature("a", 0) is Temperature.COLD
    residency.touch("a", 0)
    times = [(10, Temperature.HOT), (11, Temperature.WARM), (101, Temperature.COLD)]
    for now_ns, expected in times:
        assert residency.temperature("a", now_ns) is expected


def test_temperature_by_measured_reuse():
    residency = make(hot_ns=10, warm_ns=100)
    residency.add("a", Tier.HBM, codec(RAW, 1), 0)
    residency.touch("a", 0)
    residency.touch("a", 1000)
    # Idle for long, but the next use is due at 2000.
    assert residency.temperature("a", 1500) is Temperature.COLD
    assert residency.temperature("a", 1950) is Temperature.WARM
    assert residency.temperature("a", 1995) is Temperature.HOT
    assert residency.expected_use_ns("a", 1995) == 5


def test_the_chance_of_reuse_is_what_happened_so_far():
    residency = make()
    for index in range(20):
        residency.add(index, Tier.HBM, codec(RAW, 1), index)
        residency.touch(index, 0)
    before = residency.reuse_chance(0)
    for index in range(10):
        residency.touch(index, 1)
    assert residency.reuse_chance(19) == pytest.approx(11 / 22)
    assert residency.reuse_chance(19) > before


def test_the_snapshot_tells_codecs_temperatures_and_what_arrives():
    residency = make()
    residency.add("a", Tier.HBM, codec("int8", 30), 0)
    residency.touch("a", 5)
    residency.begin("a", Tier.DRAM, codec(RAW, 60), 0)
    assert residency.snapshot(5) == {
        "hbm": {
            "capacity_bytes": 100,
            "used_bytes": 30,
            "num_arriving": 0,
            "codecs": {"int8": 1},
            "temperatures": {"hot": 1},
        },
        "dram": {
            "capacity_bytes": 250,
            "used_bytes": 60,
            "num_arriving": 1,
            "codecs": {RAW: 1},
            "temperatures": {"hot": 1},
        },
    }


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
