"""Many requests at once through two prefill and two decode workers, while everything goes wrong.

What is sent, who leaves when, and which fault comes after which request is drawn from a seed; what
they meet is real and never the same twice.
"""

import asyncio
import random

import pytest

from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.runtime import supervisor
from tests.cluster.client import Stream
from tests.faults.proxied import GREEDY, NUM_TOKENS, SEEDED, Site, a_site
from tests.faults.proxy import Flip

SEED = 2026
LENGTHS = (1, 33, 100, 300, 700, 1100)
NUM_REQUESTS = 160
AT_ONCE = 10
REQUESTS_PER_FAULT = 4
NUM_KILLS = 4
SOAK_DEADLINE_S = 90.0
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


class Soak:
    """The requests of one soak, and what is done to them."""

    def __init__(self, site: Site, seed: int) -> None:
        self.num_faults: dict[str, int] = {}
        self._site = site
        self._wishes = random.Random(seed)
        self._rng = random.Random(seed + 1)
        self._kills = [self._rng.choice(WORKERS) for _ in range(NUM_KILLS)]
        self._hit: set[Stream] = set()
        self._live: set[Stream] = set()

    async def run(self) -> None:
        """Send everything, at most so many at once; every one of them must end well."""
        free = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_REQUESTS):
                await free.acquire()
                task = group.create_task(self._ask(*self._wish()))
                task.add_done_callback(lambda _: free.release())
                if number % REQUESTS_PER_FAULT == 0:
                    self._spoil()

    def _wish(self) -> tuple[int, SamplingParams, int | None]:
        """Draw a prompt, how to sample, and after how many tokens the client leaves, if it does."""
        draw = self._wishes
        leaves_after = draw.choice((None, None, None, 0, draw.randrange(NUM_TOKENS)))
        return draw.choice(LENGTHS), draw.choice((GREEDY, SEEDED)), leaves_after

    async def _ask(self, length: int, params: SamplingParams, leaves_after: int | None) -> None:
        stream = self._site.start(length, params)
        self._live.add(stream)
        if leaves_after is None:
            await self._site.finish([stream])
        else:
            await stream.until(leaves_after)
            stream.cancel()
        self._live.discard(stream)

    def _spoil(self) -> None:
        link = self._site.cluster.links[self._rng.choice(WORKERS[:2])]
        loop = asyncio.get_running_loop()
        fault = self._rng.choice(("flip", "flip", "cut", "stall", "slow", "kill"))
        match fault:
            case "flip":
                link.flips.append(Flip(at=64 + self._rng.randrange(32 * 5120)))
            case "cut":
                link.cut()
                loop.call_later(0.05, link.restore)
            case "stall":
                link.stall()
                loop.call_later(0.2, link.resume)
            case "slow":
                link.bytes_per_s = 2 * MIB
                loop.call_later(0.5, setattr, link, "bytes_per_s", None)
            case "kill":
                # Nobody is to be hit twice: after three attempts a request may fail.
                if self._hit & self._live or not self._kills or not self._site.is_complete():
                    return
                self._site.kill(self._kills.pop())
                self._hit = set(self._live)
        self.num_faults[fault] = self.num_faults.get(fault, 0) + 1


def test_many_requests_while_everything_goes_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "RESTARTS_PER_WINDOW", NUM_KILLS)
    monkeypatch.setattr(supervisor, "RESTART_PAUSES_S", (0.0,) * NUM_KILLS)
    with a_site(deadline_s=SOAK_DEADLINE_S, prefill=2, decode=2) as tell:
        tell(lambda site: site.undisturbed(*LENGTHS))

        async def story(site: Site) -> None:
            soak = Soak(site, SEED)
            await soak.run()
            for link in site.cluster.links.values():
                link.flips.clear()
            await site.settle()
            assert set(soak.num_faults) == {"flip", "cut", "stall", "slow", "kill"}
            status = site.cluster.status()
            assert status.failed == 0
            assert status.retried > 0

        tell(story)
