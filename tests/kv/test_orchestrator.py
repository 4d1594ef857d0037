"""The orchestrator: stories, and bytes conserved under random operations and failing moves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import MoveClass
from penstock.kv.compression import Job
from penstock.kv.dma import Descriptor
from penstock.kv.orchestrator import Orchestrator, OrchestratorConfig, Outcome
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier, TierSpec

BLOCK = 64
CODECS = (
    CodecSpec(name=RAW, block_bytes=BLOCK),
    CodecSpec(name="int8", block_bytes=BLOCK // 2, encode_ns=7, decode_ns=5, loss=0.001),
)


class Slots:
    """Gives every copy an address of its own; asserts that what comes back was given."""

    def __init__(self) -> None:
        self.taken: dict[tuple[Tier, int], int] = {}
        self.next = 0

    def place(self, key, tier, num_bytes) -> int:
        self.next += num_bytes
        self.taken[tier, self.next] = num_bytes
        return self.next

    def vacate(self, tier, address, num_bytes) -> None:
        assert self.taken.pop((tier, address)) == num_bytes


def make(*, hbm: int = 4, dram: int = 8, eviction: str = "lru", recompute_ns: int = 10**6, **more):
    """Return an orchestrator over HBM (the target), DRAM and a disk, sizes in raw blocks."""

    def link(source: Tier, destination: Tier, latency_ns: int) -> LinkSpec:
        return LinkSpec(
            source=source, destination=destination, latency_ns=latency_ns, bytes_per_ns=1
        )

    config = OrchestratorConfig(
        tiers=(
            TierSpec(tier=Tier.HBM, capacity_bytes=hbm * BLOCK),
            TierSpec(tier=Tier.DRAM, capacity_bytes=dram * BLOCK),
            TierSpec(tier=Tier.DISK, capacity_bytes=100 * BLOCK),
        ),
        links=(
            link(Tier.DRAM, Tier.HBM, 10),
            link(Tier.HBM, Tier.DRAM, 10),
            link(Tier.DISK, Tier.HBM, 1000),
            link(Tier.HBM, Tier.DISK, 1000),
        ),
        codecs=CODECS,
        target=Tier.HBM,
        eviction=eviction,
        recompute_ns=recompute_ns,
        **more,
    )
    slots = Slots()
    return Orchestrator(config, slots), slots


class Carrier:
    """Carries out descriptors and jobs at once, in the order in which they are given."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator
        self.moved: list[tuple[str, str, list[object]]] = []

    def settle(self, now_ns: int = 0) -> None:
        while True:
            descriptors, jobs = self.orchestrator.start(now_ns)
            if not descriptors and not jobs:
                return
            for descriptor in descriptors:
                keys = [t.key for t in descriptor.transfers]
                source, destination = descriptor.link.ends
                self.moved.append((source.value, destination.value, keys))
                self.orchestrator.landed(descriptor, now_ns)
            for job in jobs:
                self.orchestrator.worked(job, now_ns)
            self.orchestrator.check()


def test_a_hit_waits_for_nothing_and_a_stranger_is_missing():
    orchestrator, _ = make()
    orchestrator.store("a", Tier.HBM, RAW)
    assert orchestrator.need("a", 0, 0) is Outcome.HIT
    assert orchestrator.need("nobody", 0, 0) is Outcome.MISSING
    orchestrator.use("a", 5)
    with pytest.raises(AssertionError, match="not needed"):
        orchestrator.use("a", 6)


def test_a_block_that_waited_for_room_and_is_needed_again_is_brought_once():
    orchestrator, _ = make(hbm=2)
    for key in ("a", "c"):
        orchestrator.store(key, Tier.HBM, RAW)
        orchestrator.store(key, Tier.DRAM, RAW)
        assert orchestrator.need(key, 0, 0) is Outcome.HIT
    orchestrator.store("b", Tier.DRAM, RAW)
    assert orchestrator.need("b", 5, 0) is Outcome.COMING
    assert orchestrator.start(0) == ([], []), "there is no room beside what is needed"
    for key in ("a", "c"):
        orchestrator.use(key, 1)
    assert orchestrator.need("b", 9, 1) is Outcome.COMING
    carrier = Carrier(orchestrator)
    carrier.settle(1)
    assert carrier.moved == [("dram", "hbm", ["b"])]
    assert orchestrator.num_evicted[Tier.HBM] == 1
    for _ in range(2):
        orchestrator.use("b", 2)


def test_an_encoded_block_crosses_is_decoded_and_stays_below():
    orchestrator, _ = make()
    orchestrator.store("a", Tier.DRAM, "int8")
    assert orchestrator.need("a", 0, 0) is Outcome.COMING
    ((descriptor,), jobs) = orchestrator.start(0)
    assert (descriptor.num_bytes, jobs) == (BLOCK // 2, [])
    assert orchestrator.landed(descriptor, 42) == []
    assert not orchestrator.is_ready("a")
    (_, (job,)) = orchestrator.start(42)
    orchestrator.worked(job, 47)
    assert orchestrator.is_ready("a")
    orchestrator.waited("a", 0, 47)
    assert orchestrator.dma.books((Tier.DRAM, Tier.HBM)).exposed_ns == 42
    assert orchestrator.compression.books.exposed_ns == 5
    assert {c.tier: c.codec for c in orchestrator.residency.present("a")} == {
        Tier.DRAM: "int8",
        Tier.HBM: RAW,
    }


def test_a_prefetch_that_is_needed_meanwhile_is_promoted_and_late():
    orchestrator, _ = make(descriptor_bytes_max=1)
    for key in ("a", "b"):
        orchestrator.store(key, Tier.DRAM, RAW)
        orchestrator.expect(key, 100)
    ((first,), _) = orchestrator.start(0)
    assert first.kind is MoveClass.PREFETCH
    assert orchestrator.need("b", 20, 10) is Outcome.COMING
    orchestrator.landed(first, 74)
    ((second,), _) = orchestrator.start(74)
    assert (second.kind, second.transfers[0].deadline_ns) == (MoveClass.ONBOARD, 20)
    orchestrator.landed(second, 148)
    assert orchestrator.need("a", 150, 150) is Outcome.HIT
    assert (orchestrator.prefetch.books.used, orchestrator.prefetch.books.late) == (1, 1)


def test_a_withdrawn_wish_does_not_move():
    orchestrator, slots = make(descriptor_bytes_max=1)
    for key in ("a", "b"):
        orchestrator.store(key, Tier.DRAM, RAW)
        orchestrator.expect(key, 100)
    ((moving,), _) = orchestrator.start(0)
    orchestrator.withdraw("b")
    orchestrator.check()
    orchestrator.landed(moving, 74)
    assert orchestrator.start(74) == ([], [])
    assert orchestrator.residency.used_bytes(Tier.HBM) == BLOCK
    assert len(slots.taken) == 3


def test_the_only_copy_sinks_before_it_is_evicted_and_the_need_waits_for_room():
    orchestrator, _ = make(hbm=1)
    carrier = Carrier(orchestrator)
    orchestrator.store("only", Tier.HBM, RAW)
    orchestrator.store("wanted", Tier.DRAM, RAW)
    assert orchestrator.need("wanted", 0, 0) is Outcome.COMING
    carrier.settle()
    assert carrier.moved == [("hbm", "dram", ["only"]), ("dram", "hbm", ["wanted"])]
    assert orchestrator.is_ready("wanted")
    assert orchestrator.residency.is_present("only", Tier.DRAM)
    assert orchestrator.num_evicted[Tier.HBM] == 1


def test_what_is_cheaper_to_compute_again_is_dropped():
    orchestrator, _ = make(hbm=1, recompute_ns=5)
    carrier = Carrier(orchestrator)
    orchestrator.store("only", Tier.HBM, RAW)
    orchestrator.store("wanted", Tier.DRAM, RAW)
    orchestrator.need("wanted", 0, 0)
    carrier.settle()
    assert carrier.moved == [("dram", "hbm", ["wanted"])]
    assert "only" not in orchestrator.residency


def test_what_is_needed_is_not_evicted():
    orchestrator, _ = make(hbm=2)
    carrier = Carrier(orchestrator)
    for key in "abc":
        orchestrator.store(key, Tier.DRAM, RAW)
    for key in "abc":
        assert orchestrator.need(key, 0, 0) is Outcome.COMING
    carrier.settle()
    assert [orchestrator.is_ready(key) for key in "abc"] == [True, True, False]
    orchestrator.use("a", 5)
    carrier.settle(5)
    assert [orchestrator.is_ready(key) for key in "abc"] == [False, True, True]


def test_a_copy_from_far_is_cached_nearer_when_it_is_used_again():
    orchestrator, _ = make(hbm=8, cache_tiers=(Tier.DRAM,))
    carrier = Carrier(orchestrator)
    orchestrator.store("a", Tier.DISK, RAW)
    for now_ns in (0, 10):
        orchestrator.need("a", now_ns, now_ns)
        carrier.settle(now_ns)
        orchestrator.use("a", now_ns)
        carrier.settle(now_ns)
    assert orchestrator.residency.is_present("a", Tier.DRAM)
    assert carrier.moved == [("disk", "hbm", ["a"]), ("hbm", "dram", ["a"])]


def test_a_failed_read_is_retried_elsewhere_and_then_given_back_to_compute():
    orchestrator, _ = make()
    orchestrator.store("a", Tier.DRAM, RAW)
    orchestrator.store("a", Tier.DISK, RAW)
    orchestrator.need("a", 0, 0)
    ((first,), _) = orchestrator.start(0)
    assert first.link.source is Tier.DRAM
    assert orchestrator.landed(first, 5, is_failed=True) == []
    orchestrator.check()
    ((second,), _) = orchestrator.start(5)
    assert second.link.source is Tier.DISK
    assert orchestrator.landed(second, 9, is_failed=True) == ["a"]
    assert "a" not in orchestrator.residency
    assert orchestrator.need("a", 9, 9) is Outcome.MISSING


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["lru", "arc", "cost"]))
def test_bytes_are_conserved_under_random_operations_and_failing_moves(data, eviction):
    """And what is needed is used, or reported lost: nothing waits for ever."""
    orchestrator, slots = make(
        hbm=3, dram=4, eviction=eviction, cache_tiers=(Tier.DRAM,), prefetch_depth=2
    )
    for key in range(8):
        tier = data.draw(st.sampled_from([Tier.HBM, Tier.DRAM, Tier.DISK]))
        orchestrator.store(key, tier, RAW if tier is Tier.HBM else data.draw(_CODEC_NAMES))
    needed: list[int] = []
    flying: list[Descriptor | Job] = []
    now_ns = 0

    def end_one(*, may_fail: bool) -> None:
        event = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        if isinstance(event, Job):
            orchestrator.worked(event, now_ns)
            return
        is_failed = may_fail and data.draw(st.integers(0, 3)) == 0
        for lost in orchestrator.landed(event, now_ns, is_failed=is_failed):
            while lost in needed:
                needed.remove(lost)

    for _ in range(data.draw(st.integers(0, 40))):
        now_ns += 10
        key = data.draw(st.integers(0, 8))
        act = data.draw(st.sampled_from(["need", "expect", "withdraw", "end", "end", "use"]))
        if act == "need" and len(set(needed) | {key}) < 3:
            if orchestrator.need(key, now_ns + 50, now_ns) is not Outcome.MISSING:
                needed.append(key)
        elif act == "expect":
            orchestrator.expect(key, now_ns + 100)
        elif act == "withdraw":
            orchestrator.withdraw(key)
        elif act == "end" and flying:
            end_one(may_fail=True)
        elif act == "use" and key in needed and orchestrator.is_ready(key):
            orchestrator.use(key, now_ns)
            needed.remove(key)
        descriptors, jobs = orchestrator.start(now_ns)
        flying += [*descriptors, *jobs]
        _check(orchestrator, slots)

    for _ in range(1000):
        now_ns += 10
        descriptors, jobs = orchestrator.start(now_ns)
        flying += [*descriptors, *jobs]
        if flying:
            end_one(may_fail=False)
        for key in [key for key in needed if orchestrator.is_ready(key)]:
            orchestrator.use(key, now_ns)
            needed.remove(key)
    assert not needed
    _check(orchestrator, slots)


_CODEC_NAMES = st.sampled_from([RAW, "int8"])


def _check(orchestrator: Orchestrator, slots: Slots) -> None:
    orchestrator.check()
    for tier in (Tier.HBM, Tier.DRAM, Tier.DISK):
        taken = sum(size for (t, _), size in slots.taken.items() if t is tier)
        assert taken == orchestrator.residency.used_bytes(tier)
