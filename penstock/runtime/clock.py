"""`LoopClock`: the clock port on an asyncio event loop.

`CLOCK_MONOTONIC` is one clock for all processes of a host, so stamps that different workers put
into one timeline can be compared.
"""

import asyncio
import time
from collections.abc import Callable

from penstock.core.types import NS_PER_S


class LoopClock:
    """Real time; callbacks run on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now_ns(self) -> int:
        """Nanoseconds of the host's monotonic clock."""
        return time.monotonic_ns()

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        """Call back when the time has come; a time in the past means as soon as possible."""
        delay_ns = max(0, at_ns - time.monotonic_ns())
        self._loop.call_later(delay_ns / NS_PER_S, callback)
