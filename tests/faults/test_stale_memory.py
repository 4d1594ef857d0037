"""Shared memory that is not any more what was offered when it is read, and a worker that sleeps.

A decode worker copies out of the prefill worker's pool whenever it comes to it; what it finds there
may have changed. Nothing but the digests can tell.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from penstock.core.types import RequestId
from tests.cluster.client import Stream
from tests.faults.proxied import GREEDY, Site, Tell, a_site, prompt

NUM_BLOCKS = 96
BLOCK_BYTES = 32 * 5120
LENGTH = 1500  # 47 blocks: two of them fill a pool
SHORT = 700


@pytest.fixture(scope="module")
def tell() -> Iterator[Tell]:
    pool = {"kv_cache_bytes": NUM_BLOCKS * BLOCK_BYTES}
    options = {"transport": "shm", "is_prefix_caching": False, "engine": pool}
    # A prompt is computed in one step, hence is offered when it is done.
    with a_site(max_num_batched_tokens=2 * LENGTH, **options) as tell:
        tell(lambda site: site.undisturbed(LENGTH, SHORT))
        yield tell


def test_a_decode_worker_that_slept_through_the_lease_serves_no_stale_byte(tell: Tell):
    async def story(site: Site) -> None:
        with site.stopped("decode-0"):
            streams = site.start_both(LENGTH)
            await site.until(lambda: site.cluster.status().handing_off == 2)
            # Waits for room, hence gets what the first two lose with their leases.
            late = site.start(SHORT)
            log, sent = site.log_of("prefill-0"), offer_of(late)
            await site.until(lambda: sent in log.read_text())
        first, blocks = streams[0].request.request_id, offers(site)
        assert set(blocks[first]) & set(blocks[late.request.request_id])
        await site.finish([*streams, late])
        await site.settle()
        # Generations tell of blocks that are in use again, digests of what is in them.
        assert any(move["is_stale"] or move["is_corrupt"] for move in site.moves())
        assert site.cluster.status().retried
        assert site.cluster.status().failed == 0

    tell(story)


def test_bytes_changed_behind_the_owner_s_back_between_offer_and_pull(tell: Tell):
    async def story(site: Site) -> None:
        await site.settle()
        corrupt, recomputed = site.counts()
        with site.stopped("decode-0"):
            stream = site.start(SHORT)
            await site.until(lambda: site.cluster.status().handing_off == 1)
            block_ids = offers(site)[stream.request.request_id]
            flip_in_pool(
                site, block_ids[len(block_ids) // 2], slice(BLOCK_BYTES // 3, None, BLOCK_BYTES)
            )
        await site.finish([stream])
        await site.settle()
        assert site.counts() == (corrupt + 2, recomputed + 1)

    tell(story)


def test_a_prefill_worker_that_sleeps_is_read_all_the_same(tell: Tell):
    async def story(site: Site) -> None:
        await site.settle()
        counts = site.counts()
        with ExitStack() as sleep:
            with site.stopped("decode-0"):
                streams = site.start_both(SHORT)
                await site.until(lambda: site.cluster.status().handing_off == 2)
                await asyncio.sleep(0.3)  # its offers have left it as well, by a thread of ZeroMQ's
                sleep.enter_context(site.stopped("prefill-0"))
            await site.finish(streams)
        await site.settle()
        assert site.counts() == counts

    tell(story)


def offers(site: Site) -> dict[RequestId, list[int]]:
    """Return the blocks of every offer of the prefill worker so far, by request."""
    sent = [part.get("message") for part in site.decisions("prefill-0")]
    return {
        message["request"]["request_id"]: message["groups"][0][1]
        for message in sent
        if isinstance(message, dict) and message["type"] == "Offer"
    }


def offer_of(stream: Stream) -> str:
    """Return the words with which an offer of this request begins in the log."""
    return f'{{"type":"Offer","request":{{"request_id":"{stream.request.request_id}"'


def flip_in_pool(site: Site, block_id: int, bytes_of_block: slice, bit: int = 4) -> None:
    """Flip one bit in each of some bytes of a block of the prefill worker's pool."""
    pid, number, _ = site.info("prefill-0").regions[0].location.split(":")
    pool = np.memmap(f"/proc/{pid}/fd/{number}", np.uint8, "r+").reshape(-1, BLOCK_BYTES)
    pool[block_id, bytes_of_block] ^= 1 << bit


def test_a_block_that_was_found_spoiled_is_not_built_upon():
    async def story(site: Site) -> None:
        whole = prompt(LENGTH)
        expected = Stream(site.cluster, whole, GREEDY, salt="undisturbed")
        await expected.tokens()
        with site.stopped("decode-0"):
            first = Stream(site.cluster, whole[:SHORT], GREEDY, salt="spoiled")
            await site.until(lambda: site.cluster.status().handing_off == 1)
            for block_id in offers(site)[first.request.request_id][:-1]:
                flip_in_pool(site, block_id, slice(3, None, 4), bit=7)  # every sign
        await first.tokens()
        await site.settle()
        assert site.counts() == (2, 1)
        # Its beginning is in both caches, and only the decode worker's is right.
        again = Stream(site.cluster, whole, GREEDY, salt="spoiled")
        assert await again.tokens() == expected.token_ids
        await site.settle()

    with a_site(transport="shm", max_num_batched_tokens=2 * LENGTH) as tell:
        tell(story)
