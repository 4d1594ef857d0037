"""Real time on the event loop."""

import asyncio
import time

from penstock.runtime.clock import HostTime, LoopClock


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


def test_a_hosts_time_follows_measurements_slowly_and_never_goes_back(monkeypatch):
    real_ns = 1_000_000_000
    monkeypatch.setattr(time, "monotonic_ns", lambda: real_ns)
    host = HostTime(5_000)
    assert host.now_ns() == real_ns + 5_000
    last_ns = host.now_ns()
    for _ in range(100):
        real_ns += 1_000_000_000
        host.measure(200_000, -20_000_000)
        assert host.now_ns() > last_ns
        last_ns = host.now_ns()
    assert host.offset_ns == -20_000_000  # 20 ms off: 40 s at half a millisecond each
    host.measure(900_000, 70_000_000)  # a slow exchange tells less than a quick one
    assert host.offset_ns == -20_000_000
    host.jump(30)
    assert host.now_ns() == real_ns + 30
