"""Hot at once, warm when it has to go, cold only where nobody is disturbed and displaced."""

from penstock.core.tiers import TierConfig
from penstock.core.types import BlockHash
from penstock.kv.policy import Temperature
from penstock.kv.residency import Residency
from penstock.kv.retention import Retention
from penstock.kv.tiers import Tier, TierSpec
from penstock.worker.lines import Lines, roomy
from penstock.worker.shelf import Shelf


class Told:
    """Says of each block what a test has said."""

    def __init__(self, *, is_worth_it: bool = True) -> None:
        self.is_worth_it = is_worth_it

    def temperature(self, name: BlockHash, into: Tier) -> Temperature:
        return Temperature(name.decode().split()[0])

    def lower(
        self, name: BlockHash, above: Tier, below: list[Tier], *, is_idle: bool
    ) -> Tier | None:
        return below[0] if self.is_worth_it else None


def name(text: str) -> BlockHash:
    return BlockHash(text.encode())


def shelves(num_near: int = 2) -> list[Shelf]:
    tiers = (
        TierConfig(name="dram", num_slots=num_near, bytes_per_s=1),
        TierConfig(name="disk", num_slots=9, bytes_per_s=1),
    )
    residency = Residency(TierSpec(tier=Tier(t.name), capacity_bytes=100) for t in tiers)
    return [Shelf(tier, residency, 1, Retention(9)) for tier in tiers]


def put_one_of_each(lines: Lines, takers: list[Shelf], *, is_idle: bool) -> None:
    for warmth in ("cold", "warm", "hot"):
        lines.put(name(f"{warmth} 1"), takers, is_idle=is_idle)


def test_while_others_compute_the_hot_are_written_and_the_cold_dropped() -> None:
    takers = shelves()
    lines = Lines(Told())
    put_one_of_each(lines, takers, is_idle=False)
    assert lines.due(is_idle=False, is_short=False) == ({name("hot 1"): None}, False)
    assert takers[0].num_declined == 1


def test_where_room_runs_short_the_warm_are_written_after_the_hot() -> None:
    lines = Lines(Told())
    put_one_of_each(lines, shelves(), is_idle=False)
    line, is_cold = lines.due(is_idle=False, is_short=True)
    assert (list(line), is_cold) == ([name("hot 1"), name("warm 1")], False)


def test_an_idle_worker_writes_the_cold_last_and_forgets_them_when_it_is_not() -> None:
    takers = shelves()
    lines = Lines(Told())
    put_one_of_each(lines, takers, is_idle=True)
    line, is_cold = lines.due(is_idle=True, is_short=False)
    assert (list(line), is_cold) == ([name("hot 1"), name("warm 1")], False)
    line.clear()
    assert lines.due(is_idle=True, is_short=False) == ({name("cold 1"): None}, True)
    assert lines.due(is_idle=False, is_short=False) == ({}, False)
    assert lines.due(is_idle=True, is_short=False) == ({}, False)
    assert takers[0].num_declined == 0


def test_what_even_an_idle_worker_would_sooner_compute_is_dropped() -> None:
    takers = shelves()
    lines = Lines(Told(is_worth_it=False))
    lines.put(name("cold 1"), takers, is_idle=True)
    assert lines.due(is_idle=True, is_short=False) == ({}, False)
    assert takers[0].num_declined == 1


def test_the_cold_take_nobodys_place_but_in_the_farthest_tier() -> None:
    near, far = shelves(num_near=1)
    assert roomy([near, far]) is near
    near.begin([name("hot 1")])
    assert roomy([near, far]) is far
    far.begin([name(f"hot {number}") for number in range(9)])
    assert roomy([near, far]) is far
