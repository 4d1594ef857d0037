"""`SimClock`: time as a sorted list of things to do. Nothing here waits."""

import heapq
from collections.abc import Callable


class SimClock:
    """The clock port, and the event loop of a simulation.

    Callbacks at the same time run in the order in which they were asked for, so a run is a function
    of its inputs.
    """

    def __init__(self) -> None:
        self._now_ns = 0
        self._count = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def now_ns(self) -> int:
        """Simulated nanoseconds since the start."""
        return self._now_ns

    @property
    def num_called(self) -> int:
        """Callbacks asked for so far."""
        return self._count

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        """Call back when the time has come; a time in the past means now."""
        self._count += 1
        heapq.heappush(self._heap, (max(at_ns, self._now_ns), self._count, callback))

    def run(
        self,
        *,
        until_ns: int,
        after_each: Callable[[], None] | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> bool:
        """Run callbacks up to and including `until_ns`; return True when none is left.

        `after_each` is called after every callback: the place for invariants. `is_over` ends the
        run although callbacks are left, such as timers that would ring for ever.
        """
        while self._heap and self._heap[0][0] <= until_ns:
            self._now_ns, _, callback = heapq.heappop(self._heap)
            callback()
            if after_each is not None:
                after_each()
            if is_over is not None and is_over():
                break
        return not self._heap
