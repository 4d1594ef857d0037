"""One link is silent: what comes over the others does not wait for it."""

import asyncio

from penstock.transport.tcp import SILENCE_S
from tests.cluster.client import Stream
from tests.faults.proxied import Site, a_site

LENGTH = 300


def test_pulls_from_other_workers_do_not_wait_for_a_silent_one():
    async def story(site: Site) -> None:
        silent = site.cluster.links["prefill-0"]
        silent.stall()
        stuck: list[Stream] = []
        while not silent.stalled.is_set():
            stuck.append(site.start(LENGTH))
            await site.until(lambda: silent.stalled.is_set() or stuck[-1].finish_reason)
        others = [site.start(LENGTH) for _ in range(4)]
        async with asyncio.timeout(SILENCE_S / 2):
            await site.until(lambda: any(stream.finish_reason for stream in others))
        assert not stuck[-1].token_ids
        silent.resume()
        await site.finish([*stuck, *others])
        await site.settle()

    with a_site(prefill=2, max_num_batched_tokens=1024) as tell:
        tell(lambda site: site.undisturbed(LENGTH))
        tell(story)
