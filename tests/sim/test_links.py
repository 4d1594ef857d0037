"""Shared links: who gets which rate, and when what arrives."""

from penstock.core.types import NS_PER_S
from penstock.sim.clock import SimClock
from penstock.sim.links import Flow, Link, SharedLinks, fair_shares

A, B, C = ("out", 0), ("in", 1), ("in", 2)


def flow(*links: Link) -> Flow:
    return Flow(links, 1, lambda: None)


def arrivals(
    capacities: dict[Link, float], flows: list[tuple[float, tuple[Link, ...], int]]
) -> list[float]:
    """Start flows of (start in s, links, bytes); return when each has arrived, in s."""
    clock = SimClock()
    links = SharedLinks(clock, capacities)
    ended = [0.0] * len(flows)

    def start(i: int) -> None:
        def done() -> None:
            ended[i] = round(clock.now_ns() / NS_PER_S, 6)

        links.carry(flows[i][1], flows[i][2], done)

    for i, (at_s, _, _) in enumerate(flows):
        clock.call_at(int(at_s * NS_PER_S), lambda i=i: start(i))
    assert clock.run(until_ns=10**15)
    assert links.num_flows == 0
    return ended


def test_a_flow_alone_gets_the_narrowest_of_its_links() -> None:
    assert arrivals({A: 1000.0, B: 100.0}, [(0, (A, B), 500)]) == [5.0]


def test_two_flows_share_a_link_and_the_second_half_goes_faster() -> None:
    # Both at 50 until the short one has its 100 bytes at 2 s; the other then has 400 left at 100.
    assert arrivals({A: 100.0}, [(0, (A,), 500), (0, (A,), 100)]) == [6.0, 2.0]


def test_what_comes_later_slows_down_what_is_under_way() -> None:
    assert arrivals({A: 100.0}, [(0, (A,), 300), (1, (A,), 100)]) == [4.0, 3.0]


def test_what_one_link_does_not_let_through_others_may_use() -> None:
    """One flow is held at 10 by its way in; the other gets all the rest of the way out."""
    narrow, wide = flow(A, B), flow(A, C)
    fair_shares([narrow, wide], {A: 100.0, B: 10.0, C: 1000.0})
    assert (narrow.bytes_per_s, wide.bytes_per_s) == (10.0, 90.0)


def test_no_link_carries_more_than_it_can_and_every_flow_is_held_by_a_full_one() -> None:
    links = [("out", i) for i in range(4)] + [("in", i) for i in range(4)]
    capacities = {link: 50.0 + 10 * i for i, link in enumerate(links)}
    flows = [flow(("out", i % 4), ("in", (i * i + 1) % 4)) for i in range(30)]
    fair_shares(flows, capacities)
    used = {link: sum(f.bytes_per_s for f in flows if link in f.links) for link in links}
    assert all(used[link] <= capacities[link] + 1e-6 for link in links)
    full = {link for link in links if used[link] >= capacities[link] - 1e-6}
    assert all(f.bytes_per_s > 0 and full & set(f.links) for f in flows)
