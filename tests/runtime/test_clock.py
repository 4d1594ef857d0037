"""Real time on the event loop."""

import asyncio
import time

from penstock.runtime.clock import LoopClock


def test_it_rings_in_order_and_not_too_early():
    async def run() -> None:
        clock = LoopClock(asyncio.get_running_loop())
        rings: list[tuple[str, int]] = []
        start_ns = clock.now_ns()
        assert abs(start_ns - time.monotonic_ns()) < 1_000_000_000
        done = asyncio.Event()

        def ring(name: str) -> None:
            rings.append((name, clock.now_ns()))
            if len(rings) == 3:
                done.set()

        clock.call_at(start_ns + 30_000_000, lambda: ring("late"))
        clock.call_at(start_ns + 10_000_000, lambda: ring("soon"))
        clock.call_at(start_ns - 1, lambda: ring("past"))
        assert rings == []
        await asyncio.wait_for(done.wait(), 10)
        assert [name for name, _ in rings] == ["past", "soon", "late"]
        assert rings[1][1] >= start_ns + 9_000_000

    asyncio.run(run())
