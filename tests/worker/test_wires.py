"""Which pulls cross encoded: by the link, the codec, and what the request allows."""

import pytest
from msgspec.structs import replace

from penstock.core.config import WireCodec
from penstock.core.events import Move
from penstock.core.messages import PeerDown, Release
from penstock.core.types import KIB, Digest
from penstock.worker.wires import TRIED_EVERY
from tests.worker.story import D0, LAYOUT, P0, Story, offer_of, request, streamed_to_d0

(BLOCK_BYTES,) = LAYOUT.block_bytes
SLOW = {"transport": "tcp", "num_bytes": 256 * KIB, "finished_ns": 256 * KIB * 1000}  # 1 us a byte
ENCODED = {**SLOW, "transport": "tcp int8", "codec": "int8"}
FAST = {**SLOW, "finished_ns": 256}


def story(**codec: int) -> Story:
    costs = {"row_bytes": BLOCK_BYTES // 2, "encode_ns": 10, "decode_ns": 10, **codec}
    return Story(D0, num_blocks=64, wire=WireCodec(name="int8", **costs))


def pulled(story: Story, name: str, start: int, **how: bool) -> list[Move]:
    """Have a prompt of two blocks and a half offered; return the moves that bring it."""
    story.tell(offer_of(name, 40, start=start, max_tokens=1, **how))
    return [move.move for move in story.moves]


def landed(story: Story, **done: object) -> None:
    while story.moves:
        story.land(**done)
    story.step()


@pytest.mark.parametrize("transport", ["tcp", "tcp (python)"])
def test_the_first_pull_crosses_as_it_is_and_whole_blocks_encoded_after_it(transport):
    at = story()
    (first,) = pulled(at, "a", 100, accepts_loss=True)
    assert first.codec == "raw"
    landed(at, **{**SLOW, "transport": transport})
    whole, rest = pulled(at, "b", 200, accepts_loss=True)
    assert (whole.codec, sum(s.num_blocks for s in whole.spans[0])) == ("int8", 2)
    assert (rest.codec, sum(s.num_blocks for s in rest.spans[0])) == ("raw", 1)
    assert len(whole.digests[0]) == len(whole.generations[0]) == 2
    landed(at, **SLOW)
    assert len(at.heard(Release)) == 2
    at.assert_empty()


@pytest.mark.parametrize(
    ("how", "link", "costs"),
    [
        ({"accepts_loss": False}, SLOW, {}),
        ({"accepts_loss": True}, {**SLOW, "transport": "shm"}, {}),
        ({"accepts_loss": True}, FAST, {}),  # the codec would be the bottleneck
        ({"accepts_loss": True}, SLOW, {"row_bytes": 2 * BLOCK_BYTES}),
        ({"accepts_loss": True}, {**SLOW, "num_bytes": 100}, {}),  # too little to know the link by
    ],
)
def test_it_crosses_as_it_is_where_a_codec_may_not_or_would_not_help(how, link, costs):
    at = story(**costs)
    pulled(at, "a", 100, accepts_loss=True)
    landed(at, **link)
    assert [move.codec for move in pulled(at, "b", 200, **how)] == ["raw"]


def test_blocks_that_came_encoded_are_known_by_what_they_are_here():
    at = story()
    pulled(at, "a", 100, accepts_loss=True)
    landed(at, **SLOW)
    pulled(at, "b", 200, accepts_loss=True)
    digests = (Digest(901), Digest(902))
    move = at.land(**SLOW, digests=(digests,))
    spans = move.spans[0]
    landed(at, **SLOW)
    ours = [s.destination + i for s in spans for i in range(s.num_blocks)]
    pool = at.worker.kv.groups[0].pool
    assert tuple(map(pool.digest, ours)) == digests


def test_a_wrong_row_is_pulled_again_as_it_is():
    at = story()
    pulled(at, "a", 100, accepts_loss=True)
    landed(at, **SLOW)
    pulled(at, "b", 200, accepts_loss=True)
    at.land(**SLOW, is_corrupt=True)
    assert [move.move.codec for move in at.moves] == ["raw", "raw"]


def test_a_codec_that_turns_out_slower_is_left_and_tried_again_now_and_then():
    at = story()
    codecs = []
    for i in range(TRIED_EVERY + 8):
        moves = pulled(at, f"r{i}", 100 + 50 * i, accepts_loss=True)
        codecs.append(moves[0].codec)
        if len(moves) > 1:  # longer than all the bytes would have taken
            at.land(**{**ENCODED, "finished_ns": 512 * KIB * 1000})
            at.land(transport="tcp")
        else:
            at.land(**{**SLOW, "finished_ns": 200 * KIB * 1000})
        at.step()
    tried = [i for i, codec in enumerate(codecs) if codec == "int8"]
    # One slow pull decides nothing, a few do.
    assert tried[0] == 1
    assert 2 <= tried.index(tried[-1]) <= 4
    assert tried[-2] == len(tried) - 1
    assert tried[-1] >= TRIED_EVERY


def test_a_peer_that_was_gone_is_measured_anew():
    at = story()
    pulled(at, "a", 100, accepts_loss=True)
    landed(at, **SLOW)
    at.tell(PeerDown(worker_id=P0, epoch=1))
    assert [move.codec for move in pulled(at, "b", 200, accepts_loss=True)] == ["raw"]


def test_parts_of_a_stream_cross_encoded_once_the_link_is_known():
    at = story()
    asked = replace(request("r", 56, max_tokens=1), accepts_loss=True)
    offer, *progress = streamed_to_d0("r", 56, max_tokens=1)
    at.tell(replace(offer, request=asked))
    at.land(**SLOW)
    for message in progress:
        at.tell(message)
    assert {move.move.codec for move in at.moves} == {"int8", "raw"}
    landed(at, **SLOW)
    at.assert_empty()
