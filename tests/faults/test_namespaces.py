"""Two agents in two network namespaces, with bad weather on the wire between them.

TCP makes good what it can see: what is lost, late, swapped or damaged. What it cannot see, the
digests can.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from penstock.transport.tcp import SILENCE_S
from tests.faults.wire import End, Weather, Wire

Story = Callable[[Wire, End, End], Awaitable[None]]
SEED = 20


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[End, End]]:
    giver = End("10.77.0.1")
    taker = End("10.77.0.2")
    try:
        refusal = giver.refusal or taker.refusal
        if refusal:
            pytest.skip(f"NO NETWORK NAMESPACES, hence none of these faults is tested: {refusal}")
        yield giver, taker
    finally:
        giver.close()
        taker.close()


def tell(ends: tuple[End, End], story: Story) -> None:
    async def with_wire() -> None:
        wire = Wire(ends, SEED)
        wire.open()
        try:
            async with asyncio.timeout(60):
                await story(wire, *ends)
        finally:
            wire.close()

    asyncio.run(with_wire())


WEATHERS = {
    "fair": Weather(),
    "delay": Weather(delay_s=0.01),
    "loss": Weather(delay_s=0.001, lost=0.02),
    "corruption": Weather(delay_s=0.001, corrupt=0.02),
    "reordering": Weather(delay_s=0.001, reordered=0.2),
    "all": Weather(delay_s=0.002, lost=0.01, corrupt=0.01, reordered=0.05),
}


@pytest.mark.parametrize("name", WEATHERS)
def test_what_tcp_can_see_it_makes_good(ends: tuple[End, End], name: str):
    async def story(wire: Wire, giver: End, taker: End) -> None:
        descriptor, digests = await giver.ask("fill", len(name))
        wire.weather = WEATHERS[name]
        got, seconds = await taker.ask("pull", descriptor)
        assert got == digests
        assert seconds < 2 * SILENCE_S
        for what, count in wire.happened.items():
            assert bool(count) == (getattr(wire.weather, what, 0) > 0), what

    tell(ends, story)


def test_what_tcp_cannot_see_the_digests_tell(ends: tuple[End, End]):
    async def story(wire: Wire, giver: End, taker: End) -> None:
        descriptor, digests = await giver.ask("fill", 1)
        wire.weather = Weather(forged=0.02)
        got, _ = await taker.ask("pull", descriptor)
        wrong = sum(ours != theirs for ours, theirs in zip(got, digests, strict=True))
        assert 0 < wrong <= wire.happened["forged"]
        wire.weather = Weather()
        assert (await taker.ask("pull", descriptor))[0] == digests

    tell(ends, story)


def test_a_cable_pulled_in_the_middle_of_a_pull_and_plugged_in_again(ends: tuple[End, End]):
    async def story(wire: Wire, giver: End, taker: End) -> None:
        descriptor, digests = await giver.ask("fill", 2)
        # So slow that the pull is still under way when the cable is out.
        wire.weather = Weather(delay_s=0.05)
        pull = asyncio.create_task(taker.ask("pull", descriptor))
        await more_packets(wire, 20)
        assert not pull.done()
        wire.weather = Weather(is_down=True)
        await asyncio.sleep(1)  # how long it is out
        wire.weather = Weather()
        got, seconds = await pull
        assert got == digests
        assert wire.happened["is_down"]
        assert 1 < seconds < 2 * SILENCE_S

    tell(ends, story)


def test_a_cable_that_is_out_for_good(ends: tuple[End, End]):
    async def story(wire: Wire, giver: End, taker: End) -> None:
        descriptor, digests = await giver.ask("fill", 3)
        wire.weather = Weather(is_down=True)
        got, seconds = await taker.ask("pull", descriptor)
        assert got.startswith("DeadlineExceeded"), got
        assert seconds < 2 * SILENCE_S
        # The old connections are of no use any more; that costs no pull.
        wire.weather = Weather()
        assert (await taker.ask("pull", descriptor))[0] == digests

    tell(ends, story)


def test_the_kernel_s_own_bad_weather(ends: tuple[End, End]):
    async def story(_wire: Wire, giver: End, taker: End) -> None:
        for end in (giver, taker):
            spoiled = ("delay", "2ms", "1ms", "loss", "1%", "corrupt", "1%", "reorder", "5%")
            complaint = await end.ask("netem", *spoiled)
            if complaint:
                pytest.skip(f"tc netem cannot be used here: {complaint.strip()}")
        descriptor, digests = await giver.ask("fill", 4)
        got, seconds = await taker.ask("pull", descriptor)
        assert got == digests
        assert seconds < 2 * SILENCE_S

    tell(ends, story)


async def more_packets(wire: Wire, num_packets: int) -> None:
    """Wait until that many more have come to the wire."""
    so_far = wire.num_packets
    while wire.num_packets < so_far + num_packets:
        await asyncio.sleep(0.001)
