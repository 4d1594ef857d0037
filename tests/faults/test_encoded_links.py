"""Blocks that cross a slow link in a codec: fewer bytes, for those alone who accept a loss, and a
bit that flips in them is found as in any others.
"""

from collections.abc import Iterator

import pytest

from penstock.kv.quality import KvQuality
from tests.cluster.client import Stream
from tests.faults.proxied import GREEDY, NUM_TOKENS, Site, Tell, a_site, prompt
from tests.faults.proxy import Flip

LENGTH = 700
SLOW_BYTES_PER_S = 20_000_000
BLOCK_BYTES = 32 * 5120


@pytest.fixture(scope="module")
def tell() -> Iterator[Tell]:
    # A prompt is computed in one step, hence is one pull of whole blocks and one of the last.
    quality = KvQuality(loss_max=0.005)
    with a_site(
        max_num_batched_tokens=2 * LENGTH, handoff_codec="int8", kv_quality=quality
    ) as tell:
        tell(lambda site: site.undisturbed(LENGTH))
        yield tell


def start(site: Site, salt: str) -> Stream:
    """Send the prompt for somebody who accepts a loss; no cache knows it."""
    return Stream(site.cluster, prompt(LENGTH), GREEDY, salt=salt, accepts_loss=True)


async def learn(site: Site) -> None:
    """Have the link measured as it is now, by pulls that cross as they are."""
    site.link.bytes_per_s = SLOW_BYTES_PER_S
    for _ in range(4):
        await site.finish([site.start(LENGTH)])


def test_fewer_bytes_cross_for_those_who_accept_a_loss(tell: Tell):
    async def story(site: Site) -> None:
        await learn(site)
        stream = start(site, "lossy")
        tokens = await stream.tokens()
        assert stream.timeline is not None
        assert set(stream.timeline.transport.split("+")) == {"tcp", "tcp int8"}
        assert stream.timeline.pull_verified
        whole = LENGTH // 32
        assert stream.timeline.pull_bytes < (0.3 * whole + 1) * BLOCK_BYTES
        expected = site.expected(LENGTH, GREEDY)
        same = sum(a == b for a, b in zip(tokens, expected, strict=True))
        assert same >= 0.8 * NUM_TOKENS
        # Who is exact shares neither the codec nor what it has left in the cache.
        exact = site.start(LENGTH)
        await site.finish([exact])
        assert exact.timeline is not None
        assert exact.timeline.transport == "tcp"
        await site.settle()

    tell(story)


def test_a_bit_that_flips_in_a_row_is_found_and_the_blocks_pulled_again_as_they_are(tell: Tell):
    async def story(site: Site) -> None:
        await learn(site)
        await site.settle()
        before = site.counts()
        site.link.flips.append(Flip(at=64 + 3 * BLOCK_BYTES // 4))
        stream = start(site, "flipped")
        tokens = await stream.tokens()
        await site.settle()
        assert not site.link.flips
        assert site.counts() == (before[0] + 1, before[1])
        assert tokens == site.expected(LENGTH, GREEDY)  # all of it came as it is in the end
        assert [move["codec"] for move in site.pulls() if move["request_id"] == _id(stream)] == [
            "int8",
            "raw",
            "raw",
        ]

    tell(story)


def _id(stream: Stream) -> str:
    assert stream.timeline is not None
    return stream.request.request_id
