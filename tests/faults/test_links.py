"""The link between two workers fails them: bits flipped, cut, silent or slow while a pull is on it.

What cannot be pulled right is pulled once more, then computed again, and counted: the tokens are
always those of a quiet day.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from penstock.transport.tcp import BYTES_PER_S_MIN, SILENCE_S
from tests.faults.proxied import LEASE_S, Site, Tell, a_site
from tests.faults.proxy import OWNER, READER, REQUEST_HEADER_BYTES, Flip

LENGTH = 700
PULL_BYTES = 22 * 32 * 5120
SHORT = 300


@pytest.fixture(scope="module")
def tell() -> Iterator[Tell]:
    with a_site_of_streams(2) as tell:
        yield tell


@pytest.fixture(scope="module")
def tell_one() -> Iterator[Tell]:
    """A pull is one turn on one connection, so the places of its bytes are known."""
    with a_site_of_streams(1) as tell:
        yield tell


@contextmanager
def a_site_of_streams(num_streams: int) -> Iterator[Tell]:
    # A prompt is computed in one step, hence is one pull.
    with a_site(max_num_batched_tokens=2 * LENGTH, tcp_streams=num_streams) as tell:
        tell(lambda site: site.undisturbed(LENGTH, SHORT))
        yield tell


async def counted(site: Site, corrupt: int, recomputed: int, before: tuple[int, int]) -> None:
    """All is well again, and since `before` just this has been counted."""
    await site.settle()
    assert site.counts() == (before[0] + corrupt, before[1] + recomputed)
    assert not site.link.flips, "the link has not done what it was told"
    assert site.cluster.status().retried == 0


async def fresh_counts(site: Site) -> tuple[int, int]:
    """Return what has been counted by now."""
    await site.settle()
    return site.counts()


FLIPS = {
    # A block, once: the second pull is right. Twice: computed again.
    "block": ((Flip(),), (1, 0)),
    "block, twice": ((Flip(), Flip()), (2, 1)),
    "first byte of the first block": ((Flip(at=64),), (1, 0)),
    "last byte of the last block": ((Flip(at=64 + PULL_BYTES - 32 * 160 - 1),), (1, 0)),
    # The owner's header: it does not talk as a peer does.
    "magic of the reply": ((Flip(at=0),), (0, 1)),
    "status of the reply": ((Flip(at=4, bit=0),), (0, 1)),
    "id of the reply": ((Flip(at=8),), (0, 1)),
    "size of the reply": ((Flip(at=17),), (0, 1)),
    # Blocks are followed by their generations: they look as if they had been handed out anew.
    "generation": ((Flip(at=64, skip=1),), (0, 1)),
    # The reader's words: refused, or other bytes than it has asked for.
    "magic of the request": ((Flip(READER, at=0),), (0, 1)),
    "epoch of the request": ((Flip(READER, at=8),), (0, 1)),
    "region of the request": ((Flip(READER, at=16),), (0, 1)),
    "first byte of the request": ((Flip(READER, at=REQUEST_HEADER_BYTES, bit=0),), (1, 0)),
    "bytes of the request": ((Flip(READER, at=REQUEST_HEADER_BYTES + 8),), (0, 1)),
    "byte far outside": ((Flip(READER, at=REQUEST_HEADER_BYTES + 6),), (0, 1)),
}


@pytest.mark.parametrize("what", FLIPS)
def test_a_bit_flipped_on_the_way(tell_one: Tell, what: str):
    tell_one(flipped(*FLIPS[what]))


FLIPS_OF_TWO = {
    # Both streams' parts of a pull are that long: the second flip lets the other stream's pass.
    "block": ((Flip(),), (1, 0)),
    "block, twice": ((Flip(), Flip(skip=1)), (2, 1)),
    "both streams": ((Flip(), Flip()), (1, 0)),
    "size of the reply": ((Flip(at=17),), (0, 1)),
    "generation": ((Flip(at=64, skip=2),), (0, 1)),
    "byte far outside": ((Flip(READER, at=REQUEST_HEADER_BYTES + 6),), (0, 1)),
}


@pytest.mark.parametrize("what", FLIPS_OF_TWO)
def test_a_bit_flipped_on_one_of_two_streams(tell: Tell, what: str):
    tell(flipped(*FLIPS_OF_TWO[what]))


def flipped(flips: tuple[Flip, ...], counts: tuple[int, int]) -> Callable[[Site], Awaitable[None]]:
    """Return the story in which that is flipped and that is counted: corrupt, recomputed."""

    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        site.link.flips += flips
        await site.finish([site.start(LENGTH)])
        await counted(site, *counts, before)

    return story


@pytest.mark.parametrize(("speaker", "at"), [(OWNER, 9), (READER, 3), (READER, 20)])
def test_a_bit_flipped_in_the_handshake(tell: Tell, speaker: str, at: int):
    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        site.link.cut()
        site.link.restore()
        site.link.flips.append(Flip(speaker, at=at, is_in_handshake=True))
        await site.finish([site.start(LENGTH)])
        await counted(site, 0, 1, before)
        await site.finish([site.start(LENGTH)])
        await counted(site, 0, 1, before)

    tell(story)


def test_a_link_cut_in_the_middle_of_a_pull_and_restored(tell: Tell):
    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        link, num_connections = site.link, site.link.num_connections
        link.stall(PULL_BYTES // 2)
        streams = [site.start(LENGTH)]
        await link.stalled.wait()
        link.cut()
        link.restore()
        link.resume()
        await site.finish(streams)
        assert link.num_connections > num_connections
        await counted(site, 0, 0, before)

    tell(story)


def test_a_link_cut_for_good_and_restored_after_all(tell: Tell):
    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        link = site.link
        link.stall(PULL_BYTES // 2)
        streams = [*site.start_both(LENGTH), *site.start_both(LENGTH)]
        await link.stalled.wait()
        link.cut()
        link.resume()
        await site.finish(streams)
        link.restore()
        await counted(site, 0, len(streams), before)
        await site.finish(site.start_both(LENGTH))
        await counted(site, 0, len(streams), before)

    tell(story)


def test_a_slow_link_is_waited_for(tell: Tell):
    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        site.link.bytes_per_s = BYTES_PER_S_MIN
        try:
            await site.finish([site.start(LENGTH)])
        finally:
            site.link.bytes_per_s = None
        assert _seconds(site.moves()[-1]) > PULL_BYTES / BYTES_PER_S_MIN / 2
        await counted(site, 0, 0, before)

    tell(story)


def test_a_link_that_trickles_is_given_up_in_time(tell: Tell):
    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        site.link.bytes_per_s = 50_000
        try:
            await site.finish([site.start(SHORT)])
        finally:
            site.link.bytes_per_s = None
        # Each silence, and all of it with what its bytes may take.
        assert _seconds(site.moves()[-1]) < 3 * SILENCE_S
        await counted(site, 0, 1, before)

    tell(story)


def test_a_prefill_worker_that_stands_still_for_longer_than_the_lease(tell: Tell):
    """Its requests end without it; when it goes on, it learns that nobody wants its blocks."""

    async def story(site: Site) -> None:
        before = await fresh_counts(site)
        site.link.stall()
        streams = [site.start(LENGTH)]
        await site.link.stalled.wait()
        with site.stopped("prefill-0"):
            site.link.resume()
            await site.finish(streams)
            assert LEASE_S <= _seconds(site.moves()[-1]) < 3 * SILENCE_S
        await counted(site, 0, 1, before)
        await site.finish(site.start_both(LENGTH))

    tell(story)


def _seconds(move: dict[str, object]) -> float:
    return (int(str(move["finished_ns"])) - int(str(move["started_ns"]))) / 1e9
