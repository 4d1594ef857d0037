"""Requests held in one state of their hand-off, for as long as a test looks at them.

Each is a context that begins once two requests, greedy and seeded, are known to be in that state,
and that lets them go on when it ends. For a cluster with one prefill and one decode worker that
have `SEATS` seats each.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.cluster.client import Stream
from tests.faults.proxied import ENDLESS, Site

SEATS = 2
PROMPT_TOKENS = 1500
PART_OF_A_PULL_BYTES = 3 << 20


@asynccontextmanager
async def prefilling(site: Site) -> AsyncIterator[list[Stream]]:
    """Their prompts are being computed."""
    log = site.log_of("prefill-0")
    num_bytes = log.stat().st_size
    streams = site.start_both(PROMPT_TOKENS)
    await site.until(lambda: log.stat().st_size > num_bytes)
    with site.stopped("prefill-0"):
        status = site.cluster.status()
        assert (status.prefilling, status.handing_off) == (2, 0)
        yield streams


@asynccontextmanager
async def offered(site: Site) -> AsyncIterator[list[Stream]]:
    """They are offered, and the decode worker has no seat for them: no pull has begun."""
    fillers = [site.start(100, ENDLESS) for _ in range(SEATS)]
    for filler in fillers:
        await filler.until(1)
    num_pulls = len(site.pulls())
    streams = site.start_both(PROMPT_TOKENS)
    await site.until(lambda: site.cluster.status().handing_off == 2)
    assert site.cluster.status().decoding == SEATS
    assert len(site.pulls()) == num_pulls
    try:
        yield streams
    finally:
        for filler in fillers:
            filler.cancel()


@asynccontextmanager
async def in_flight(site: Site) -> AsyncIterator[list[Stream]]:
    """Part of what is pulled for the first has arrived, the rest is on the way."""
    link = site.link
    link.stall(PART_OF_A_PULL_BYTES)
    streams = site.start_both(PROMPT_TOKENS)
    await link.stalled.wait()
    await site.until(lambda: site.cluster.status().handing_off == 2)
    try:
        yield streams
    finally:
        link.resume()


@asynccontextmanager
async def decoding(site: Site) -> AsyncIterator[list[Stream]]:
    """The first has landed and its first tokens are out; the other may be done already."""
    earlier, later = site.start_both(PROMPT_TOKENS)
    await later.until(2)
    assert later.finish_reason is None
    yield [later, earlier]


STATES = {state.__name__: state for state in (prefilling, offered, in_flight, decoding)}
