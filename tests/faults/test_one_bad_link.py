"""One link is silent: what comes over the others does not wait for it."""

import asyncio

from penstock.transport.tcp import SILENCE_S
from tests.faults.proxied import Site, a_site

LENGTH = 300


def test_pulls_from_other_workers_do_not_wait_for_a_silent_one():
    async def story(site: Site) -> None:
        links = [site.cluster.links[name] for name in ("prefill-0", "prefill-1")]
        for link in links:
            link.stall()
        stuck = site.start(LENGTH)
        await site.until(lambda: any(link.stalled.is_set() for link in links))
        # Whose blocks they are, it stays silent; the other does not.
        silent, good = sorted(links, key=lambda link: not link.stalled.is_set())
        good.resume()
        others = [site.start(LENGTH) for _ in range(4)]
        async with asyncio.timeout(SILENCE_S / 2):
            await site.until(lambda: any(stream.finish_reason for stream in others))
        assert not stuck.token_ids
        silent.resume()
        await site.finish([stuck, *others])
        await site.settle()

    with a_site(prefill=2, max_num_batched_tokens=1024) as tell:
        tell(lambda site: site.undisturbed(LENGTH))
        tell(story)
