"""`LoopClock`: the clock port on an asyncio event loop; `HostTime`: the cluster's time on one host.

`CLOCK_MONOTONIC` is one clock for all processes of a host, so stamps that its workers put into one
timeline can be compared. Another host's starts elsewhere: its processes add an offset to it, so
that everybody speaks in the controller's time. The offset is known to half a round trip.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from penstock.core.types import NS_PER_S

SLEW: Final = 500e-6
"""The most by which the offset follows a new measurement, per second: time never goes back."""
MEASUREMENTS_KEPT: Final = 16


class HostTime:
    """This host's monotonic clock plus an offset, in nanoseconds. 0 on the controller's host."""

    def __init__(self, offset_ns: int = 0) -> None:
        self.offset_ns = offset_ns
        self._measured: list[tuple[int, int]] = []
        self._slewed_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        """Return the cluster's time."""
        return time.monotonic_ns() + self.offset_ns

    def measure(self, round_trip_ns: int, offset_ns: int) -> None:
        """Take an exchange with the controller into account: how long it took, and which offset
        it means if both ways were equally long. The shortest of the last ones is believed.
        """
        self._measured = [*self._measured, (round_trip_ns, offset_ns)][-MEASUREMENTS_KEPT:]
        now_ns = time.monotonic_ns()
        most_ns = int((now_ns - self._slewed_ns) * SLEW)
        wanted_ns = min(self._measured)[1] - self.offset_ns
        self.offset_ns += max(-most_ns, min(most_ns, wanted_ns))
        self._slewed_ns = now_ns

    def jump(self, offset_ns: int) -> None:
        """Begin anew with another controller, at a moment when nothing is under way."""
        self.offset_ns = offset_ns
        self._measured = []


class LoopClock:
    """Real time; callbacks run on the loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._loop = loop
        self._now = now

    def now_ns(self) -> int:
        """Nanoseconds of the cluster's time."""
        return self._now()

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        """Call back when the time has come; a time in the past means as soon as possible."""
        delay_ns = max(0, at_ns - self._now())
        self._loop.call_later(delay_ns / NS_PER_S, callback)
