"""DMA scheduler: who goes first, who rides together, and that nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import MoveClass
from penstock.kv.dma import CLASSES, Descriptor, DmaScheduler, Transfer, TransferState
from penstock.kv.tiers import LinkSpec, Tier

UP = (Tier.DRAM, Tier.HBM)
DOWN = (Tier.HBM, Tier.DRAM)


def make(*, num_queues: int = 1, **settings) -> DmaScheduler:
    links = [
        LinkSpec(source=a, destination=b, latency_ns=10, bytes_per_ns=2, num_queues=num_queues)
        for a, b in (UP, DOWN)
    ]
    return DmaScheduler(links, **settings)


def transfer(
    name: str,
    kind: MoveClass = MoveClass.ONBOARD,
    deadline_ns: int = 0,
    *,
    at: int | None = None,
    to: int | None = None,
    link=UP,
    num_bytes: int = 100,
) -> Transfer:
    # Far apart unless a test says where.
    address = hash(name) % 10**9 * 1000 if at is None else at
    return Transfer(name, kind, link, num_bytes, deadline_ns, address, to)


def one(dma: DmaScheduler, now_ns: int = 0) -> Descriptor:
    (descriptor,) = dma.start(now_ns)
    return descriptor


def names(descriptor: Descriptor) -> list[str]:
    return [t.key for t in descriptor.transfers]


def drain(dma: DmaScheduler) -> list[str]:
    """Carry everything out, one after the other; return the keys in order."""
    order = []
    while started := dma.start(0):
        for descriptor in started:
            order += names(descriptor)
            dma.finish(descriptor, 0)
            dma.check()
    return order


def test_class_before_deadline_before_order():
    dma = make(shares=dict.fromkeys(CLASSES, 0.0))
    for name, kind, deadline_ns in [
        ("offload", MoveClass.OFFLOAD, 0),
        ("late", MoveClass.ONBOARD, 9),
        ("early", MoveClass.ONBOARD, 5),
        ("early too", MoveClass.ONBOARD, 5),
        ("prefetch", MoveClass.PREFETCH, 1),
        ("handoff", MoveClass.HANDOFF, 99),
    ]:
        dma.submit(transfer(name, kind, deadline_ns))
    assert drain(dma) == ["handoff", "early", "early too", "late", "prefetch", "offload"]


def test_a_link_is_fed_as_many_descriptors_as_it_has_queues():
    dma = make(num_queues=2)
    for name in "abc":
        dma.submit(transfer(name))
    dma.submit(transfer("down", link=DOWN))
    started = dma.start(0)
    assert sorted(names(d)[0] for d in started) == ["a", "b", "down"]
    assert dma.start(0) == []
    dma.finish(started[0], 7)
    assert names(one(dma)) == ["c"]


def test_neighbours_ride_in_one_descriptor_from_the_middle_out():
    dma = make()
    for name, at in [("c", 200), ("a", 0), ("b", 100), ("far", 500)]:
        dma.submit(transfer(name, deadline_ns=0 if name == "b" else 9, at=at))
    descriptor = one(dma)
    assert names(descriptor) == ["a", "b", "c"]
    assert descriptor.num_bytes == 300
    assert descriptor.link.duration_ns(descriptor.num_bytes) == 160
    dma.finish(descriptor, 160)
    assert names(one(dma, 160)) == ["far"]
    assert dma.books(UP).num_descriptors == 1
    assert dma.books(UP).num_transfers == 3
    assert dma.books(UP).busy_ns == 160


def test_neighbours_must_be_so_at_both_ends_and_of_one_class():
    dma = make()
    dma.submit(transfer("a", at=0, to=1000))
    dma.submit(transfer("b", at=100, to=1100))
    dma.submit(transfer("gap", at=200, to=5000))
    dma.submit(transfer("lower", MoveClass.PREFETCH, at=300, to=5100))
    assert names(one(dma)) == ["a", "b"]


def test_a_descriptor_has_a_largest_size():
    dma = make(descriptor_bytes_max=250)
    for index in range(3):
        dma.submit(transfer(str(index), at=100 * index))
    assert names(one(dma)) == ["0", "1"]


def test_cancel_and_promote_while_waiting_and_not_after():
    dma = make()
    a, b, c = transfer("a"), transfer("b", MoveClass.PREFETCH, 5), transfer("c", deadline_ns=9)
    for each in (a, b, c):
        dma.submit(each)
    descriptor = one(dma)
    assert names(descriptor) == ["a"]
    assert not dma.cancel(a)
    assert not dma.promote(a, MoveClass.HANDOFF, 0)
    assert dma.cancel(c)
    assert c.state is TransferState.CANCELLED
    assert dma.promote(b, MoveClass.ONBOARD, 7)
    assert (b.kind, b.deadline_ns) == (MoveClass.ONBOARD, 5)
    assert not dma.promote(b, MoveClass.OFFLOAD, 9)
    dma.finish(descriptor, 60)
    assert drain(dma) == ["b"]
    assert (dma.books(UP).num_cancelled, dma.books(UP).num_promoted) == (1, 1)


def test_a_lower_class_gets_its_share_of_a_link_that_is_never_free():
    dma = make(shares={**dict.fromkeys(CLASSES, 0.0), MoveClass.OFFLOAD: 0.1})
    for index in range(100):
        dma.submit(transfer(f"low {index}", MoveClass.OFFLOAD, at=10**6 + 1000 * index))
    moved = dict.fromkeys(CLASSES, 0)
    for index in range(1000):
        dma.submit(transfer(f"high {index}", at=10**9 + 1000 * index))
        descriptor = one(dma)
        moved[descriptor.kind] += 1
        dma.finish(descriptor, 0)
    # One tenth of what is given to others, so one eleventh of all.
    assert moved[MoveClass.OFFLOAD] == pytest.approx(1000 / 11, abs=2)


def test_late_and_exposed_are_booked_apart_from_busy():
    dma = make()
    dma.submit(transfer("a", deadline_ns=5))
    dma.submit(transfer("b", deadline_ns=500))
    first = one(dma, 0)
    dma.finish(first, 60)
    second = one(dma, 60)
    dma.finish(second, 120)
    dma.expose(UP, 55)
    books = dma.books(UP)
    assert (books.num_late, books.busy_ns, books.exposed_ns) == (1, 120, 55)
    assert books.num_bytes[MoveClass.ONBOARD] == 200


def test_the_wait_ahead_counts_what_is_as_urgent_or_more():
    dma = make()
    assert dma.ahead_ns(UP, MoveClass.OFFLOAD) == 0
    dma.submit(transfer("a"))
    one(dma)
    dma.submit(transfer("b", MoveClass.PREFETCH))
    assert dma.ahead_ns(UP, MoveClass.ONBOARD) == 60
    assert dma.ahead_ns(UP, MoveClass.PREFETCH) == 120


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),  # address / 100
            st.sampled_from(CLASSES),
            st.integers(0, 20),  # deadline
            st.sampled_from(["stay", "cancel", "promote"]),
        ),
        max_size=40,
    ),
    st.integers(1, 3),
)
def test_every_transfer_moves_once_or_is_cancelled(plans, num_queues):
    dma = make(num_queues=num_queues)
    expected = set()
    for index, (place, kind, deadline_ns, fate) in enumerate(plans):
        each = transfer(str(index), kind, deadline_ns, at=100 * place)
        dma.submit(each)
        if fate == "cancel" and dma.cancel(each):
            continue
        if fate == "promote":
            dma.promote(each, MoveClass.HANDOFF, 0)
        expected.add(each.key)
        dma.check()
    order = drain(dma)
    assert len(order) == len(set(order))
    assert set(order) == expected
    assert dma.books(UP).num_transfers == len(expected)
    assert sum(dma.books(UP).num_bytes.values()) == 100 * len(expected)


def test_the_first_descriptors_correct_a_wrong_expectation_at_once():
    dma = DmaScheduler(
        [LinkSpec(source=Tier.DRAM, destination=Tier.HBM, latency_ns=0, bytes_per_ns=10)]
    )
    for expected_ns in (550, 700, 775):
        dma.measure((Tier.DRAM, Tier.HBM), 1000, 1000)
        assert dma.alone_ns((Tier.DRAM, Tier.HBM), 1000) == pytest.approx(expected_ns)
