"""A client that goes away at any state of a hand-off: nothing is kept for it, nobody else notices.

The HTTP server calls `cancel` when a connection closes; so do these.
"""

from collections.abc import Iterator

import pytest

from tests.faults.held import PROMPT_TOKENS, SEATS, STATES
from tests.faults.proxied import NUM_TOKENS, Site, Tell, a_site


@pytest.fixture(scope="module")
def tell() -> Iterator[Tell]:
    with a_site(max_num_seqs=SEATS) as tell:
        tell(lambda site: site.undisturbed(PROMPT_TOKENS))
        yield tell


@pytest.mark.parametrize("state", STATES)
def test_one_client_leaves_and_the_other_gets_its_tokens(tell: Tell, state: str):
    async def story(site: Site) -> None:
        async with STATES[state](site) as (leaving, staying):
            leaving.cancel()
            num_tokens = len(leaving.token_ids)
        await site.finish([staying])
        await site.settle()
        assert len(leaving.token_ids) == num_tokens < NUM_TOKENS
        assert site.cluster.status().retried == 0

    tell(story)


@pytest.mark.parametrize("state", STATES)
def test_all_clients_leave_and_all_blocks_come_back(tell: Tell, state: str):
    async def story(site: Site) -> None:
        async with STATES[state](site) as streams:
            for stream in streams:
                stream.cancel()
            assert site.cluster.status().prefilling == site.cluster.status().handing_off == 0
        await site.settle()
        # And nothing of the half-done work is taken for the whole.
        again = site.start_both(PROMPT_TOKENS)
        await site.finish(again)

    tell(story)


def test_a_client_leaves_while_the_link_is_dead_and_stays_dead(tell: Tell):
    async def story(site: Site) -> None:
        link = site.link
        link.stall(1 << 20)
        streams = site.start_both(PROMPT_TOKENS)
        await link.stalled.wait()
        for stream in streams:
            stream.cancel()
        link.cut()
        link.resume()
        await site.settle()
        link.restore()
        await site.finish(site.start_both(PROMPT_TOKENS))
        await site.settle()

    tell(story)
