"""A request that decodes with a part of its KV gives the rest back, and stays where it is."""

from msgspec import structs

from penstock.core.block import extend_hashes
from penstock.core.events import StepDone
from penstock.core.messages import Migrate, Offer, PeerUp, Tokens
from penstock.core.request import Request
from penstock.core.step import Sampled
from penstock.core.types import BlockHash, Digest, RequestId
from penstock.sim.executor import chain_layout
from tests.worker.story import D0, P0, Story, assign, info_of, request

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
    assert story.steps[0].gaps.tolist() == [[0, 1, 3]]
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


def selecting(num_prompt: int = 180) -> Request:
    return structs.replace(request(NAME, num_prompt, max_tokens=12), kv_select=64)


def observe(story: Story, scores: tuple[float, ...]) -> None:
    """End a step that observes, and no other."""
    step = story.steps.pop(0)
    (seen,) = step.observations
    assert (seen.position, len(seen.token_ids)) == (163, 16)
    assert seen.token_ids == tuple(selecting().prompt_token_ids[163:179])
    digests = tuple(tuple(Digest(i + 1) for i in ids) for ids in step.digests_of)
    times = {"started_ns": 0, "finished_ns": 0}
    story.tell(
        StepDone(
            step_id=step.step_id,
            sampled=tuple(Sampled(5) for _ in step.samples),
            digests=digests,
            scores=(scores,),
            **times,
        )
    )


SCORES = tuple(float(entry == 3) for entry in range(11))
"""Of 12 blocks the first and the last two stay; of the others the fourth is looked at most."""


def test_the_blocks_that_the_end_looks_at_are_kept_and_only_they_cross() -> None:
    story = Story(P0, max_num_batched_tokens=100)
    story.tell(assign(selecting(), D0))
    assert not story.step().observations
    assert not story.heard(Offer)  # not before it is known what is kept
    observe(story, SCORES)
    (offer,) = story.heard(Offer)
    assert isinstance(offer, Offer)
    assert offer.gaps == ((1, 2), (4, 6))
    assert offer.timeline.selected_tokens == 179 - 8 * BLOCK_SIZE
    other = Story(D0)
    other.tell(offer)
    (move,) = other.moves
    moved = sum(span.num_blocks for span in move.move.spans[0])
    assert moved == 4 == len(other.worker.kv.held(NAME)[0])  # type: ignore[index]
    other.land()
    step = other.step()
    assert not step.observations
    assert step.gaps is not None
    assert step.gaps.tolist() == [[0, 1, 2], [0, 4, 6]]
    while other.steps:
        other.step()
    other.assert_empty()


def test_one_worker_chooses_at_the_same_place_and_names_nothing_behind_it() -> None:
    story = Story(P0)
    story.tell(assign(selecting(), P0))
    observe(story, SCORES)
    step = story.step()
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([179], [1])
    assert step.gaps is not None
    assert step.gaps.tolist() == [[0, 1, 2], [0, 4, 6]]
    while story.steps:
        story.step()
    # Prompt and answer fill twelve blocks; the last was computed with a part of the KV.
    assert story.worker.kv.cached_blocks == (11,)
    story.assert_empty()


def test_who_has_blocks_of_another_shape_chooses_for_itself() -> None:
    story = Story(P0)
    other_shape = structs.replace(info_of(D0), layout=chain_layout(8))
    story.tell(PeerUp(info=other_shape))
    story.tell(assign(selecting(), D0))
    assert not story.step().observations
    (offer,) = story.heard(Offer)
    assert isinstance(offer, Offer)
    assert offer.gaps is None
    there = Story(D0)
    there.tell(offer)
    there.land()
    observe(there, SCORES)
    assert there.steps[0].gaps is not None


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
