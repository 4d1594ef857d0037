"""`SharedLinks`: bytes on their way over links that others use too.

A flow crosses one or more links (out of a host, into another) and gets its max-min fair share of
them: links are filled together until one is full, what crosses that one keeps its rate, the rest
goes on growing. Shares change whenever a flow begins or ends. It knows bytes and rates alone; who
sends what is for `penstock/sim/fabric.py` to know, its only caller.
"""

from collections.abc import Callable, Iterable

from penstock.core.types import NS_PER_S
from penstock.sim.clock import SimClock

Link = tuple[str, int]
"""What kind of link, and of which host."""
_EPSILON_BYTES = 0.5


class Flow:
    """Bytes still to be carried over `links`, at `bytes_per_s`."""

    __slots__ = ("bytes_left", "bytes_per_s", "done", "links")

    def __init__(self, links: tuple[Link, ...], num_bytes: int, done: Callable[[], None]) -> None:
        self.links = links
        self.bytes_left = float(num_bytes)
        self.bytes_per_s = 0.0
        self.done = done


class SharedLinks:
    """All links of a cluster, by name, with their capacities in bytes per second."""

    def __init__(self, clock: SimClock, capacities: dict[Link, float]) -> None:
        self._clock = clock
        self._capacities = capacities
        self._flows: dict[Flow, None] = {}
        self._settled_ns = 0
        self._version = 0
        self.bytes_carried: dict[Link, int] = dict.fromkeys(capacities, 0)

    def carry(self, links: Iterable[Link], num_bytes: int, done: Callable[[], None]) -> None:
        """Start a flow; `done` is called when its last byte is there."""
        flow = Flow(tuple(links), num_bytes, done)
        for link in flow.links:
            self.bytes_carried[link] += num_bytes
        self._settle()
        self._flows[flow] = None
        self._share()

    @property
    def num_flows(self) -> int:
        """Flows under way."""
        return len(self._flows)

    def _settle(self) -> None:
        """Take off every flow what it has carried since the last time."""
        now_ns = self._clock.now_ns()
        elapsed_s = (now_ns - self._settled_ns) / NS_PER_S
        self._settled_ns = now_ns
        for flow in self._flows:
            flow.bytes_left -= flow.bytes_per_s * elapsed_s

    def _share(self) -> None:
        """Give every flow its rate, and wake up when the first of them ends."""
        fair_shares(list(self._flows), self._capacities)
        self._version += 1
        version = self._version
        if not self._flows:
            return
        first_s = min(max(flow.bytes_left, 0.0) / flow.bytes_per_s for flow in self._flows)
        # Rounded up: a flow looked at one nanosecond too early would have a byte left.
        at_ns = self._clock.now_ns() + int(first_s * NS_PER_S) + 1
        self._clock.call_at(at_ns, lambda: self._end_finished(version))

    def _end_finished(self, version: int) -> None:
        if version != self._version:
            return  # shares have changed since; another call is due
        self._settle()
        finished = [flow for flow in self._flows if flow.bytes_left <= _EPSILON_BYTES]
        for flow in finished:
            del self._flows[flow]
        self._share()
        for flow in finished:
            flow.done()


def fair_shares(flows: list[Flow], capacities: dict[Link, float]) -> None:
    """Set every flow's max-min fair rate. O(links x flows) at worst."""
    open_flows: dict[Flow, None] = dict.fromkeys(flows)
    left = {link: capacities[link] for flow in flows for link in flow.links}
    while open_flows:
        users: dict[Link, int] = {}
        for flow in open_flows:
            for link in flow.links:
                users[link] = users.get(link, 0) + 1
        narrowest = min(users, key=lambda link: left[link] / users[link])
        rate = left[narrowest] / users[narrowest]
        for flow in [flow for flow in open_flows if narrowest in flow.links]:
            flow.bytes_per_s = rate
            del open_flows[flow]
            for link in flow.links:
                left[link] = max(left[link] - rate, 0.0)
