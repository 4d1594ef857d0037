"""A request that decodes behind a window gives the middle of its KV back, and stays where it is."""

from msgspec import structs

from penstock.core.block import extend_hashes
from penstock.core.messages import Migrate, Offer, Tokens
from penstock.core.request import Request
from penstock.core.types import BlockHash, RequestId
from tests.worker.story import D0, P0, Story, assign, request

NAME = RequestId("w")
BLOCK_SIZE = 16


def windowed(window: int = 20) -> Request:
    return structs.replace(request(NAME, 100, start=100, max_tokens=40), kv_window=window)


def test_blocks_between_the_first_and_the_window_are_free_as_decoding_goes_on() -> None:
    story = Story(P0, num_blocks=16)
    story.tell(assign(windowed(), P0))
    # The prompt is read with all there is.
    assert story.steps[0].gaps is None
    story.step()
    (held,) = story.worker.kv.held(NAME) or ()
    # 100 tokens are 7 blocks; the first, and the three that 20 tokens may lie in.
    assert len(held) == 4
    assert story.steps[0].gaps is not None
    assert story.steps[0].gaps.tolist() == [[1, 3]]
    assert story.steps[0].num_computed.tolist() == [100]
    for _ in range(20):
        story.step()
    (held,) = story.worker.kv.held(NAME) or ()
    assert len(held) == 4
    while story.steps:
        story.step()
    tokens = [out for sent in story.heard(Tokens) for out in sent.outputs]  # type: ignore[attr-defined]
    assert sum(len(out.token_ids) for out in tokens) == 40
    story.assert_empty()


def test_it_is_not_handed_on_since_a_part_of_it_is_gone() -> None:
    story = Story(P0, num_blocks=16)
    story.tell(assign(windowed(), P0))
    story.step()
    story.tell(Migrate(request_id=NAME, decode_worker=D0))
    story.step()
    assert not story.heard(Offer)
    while story.steps:
        story.step()
    story.assert_empty()


def test_a_prompt_that_is_handed_off_crosses_whole() -> None:
    story = Story(P0, num_blocks=16)
    story.tell(assign(windowed(), D0))
    story.step()
    offers = [message for message in story.heard(Offer) if isinstance(message, Offer)]
    assert offers
    assert all(block >= 0 for offer in offers for block in offer.groups[0].block_ids)
    (held,) = story.worker.kv.held(NAME) or ()
    assert len(held) == 7


def test_names_are_those_of_the_window_alone() -> None:
    tokens = list(range(64))

    def names(**more: int) -> list[BlockHash]:
        found: list[BlockHash] = []
        extend_hashes(found, tokens, BLOCK_SIZE, "salt", **more)  # type: ignore[arg-type]
        return found

    assert len({names()[-1], names(kv_window=20)[-1], names(kv_window=21)[-1]}) == 3
    asked = windowed()
    found: list[BlockHash] = []
    extend_hashes(found, asked.prompt_token_ids, BLOCK_SIZE, asked.cache_salt, kv_window=20)
    again = windowed().root
    assert again == asked.root != structs.replace(asked, kv_window=0).root
