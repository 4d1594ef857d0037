"""The worker core as stories: events in, expected commands out."""

import numpy as np

from penstock.core.events import StepDone
from penstock.core.messages import Hello, Load, Tokens
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, FinishReason
from tests.worker.story import D0, P0, Story, assign, info_of, request


def test_a_worker_alone_prefills_samples_and_finishes() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 20, max_tokens=2), P0))
    step = story.step()
    assert step.num_new.tolist() == [20]
    assert step.samples[0].position == 20
    step = story.step()
    assert (step.num_new.tolist(), step.num_computed.tolist()) == ([1], [20])
    assert step.token_ids.tolist() == [5]
    first, last = story.heard(Tokens)
    assert first.outputs[0].timeline is not None
    assert last.outputs[0].finish_reason is FinishReason.LENGTH
    assert last.outputs[0].timeline is None
    story.assert_empty()


def test_eos_ends_a_request_unless_it_is_to_be_ignored() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=9), P0))
    story.step(token_id=7)
    (tokens,) = story.heard(Tokens)
    assert tokens.outputs[0].finish_reason is FinishReason.STOP
    story.tell(assign(request("s", 4, max_tokens=9, ignore_eos=True), P0))
    story.step(token_id=7)
    (tokens,) = story.heard(Tokens)
    assert tokens.outputs[0].finish_reason is None


def test_a_long_prompt_is_computed_in_chunks_while_others_decode_first() -> None:
    story = Story(P0, max_num_batched_tokens=32)
    story.tell(assign(request("short", 5, max_tokens=9), P0))
    story.step()
    story.tell(assign(request("long", 70, start=500), P0))
    story.step()
    chunks = [story.step().num_new.tolist() for _ in range(3)]
    assert chunks == [[1, 31], [1, 31], [1, 8]]


def test_the_youngest_is_preempted_and_recomputed() -> None:
    story = Story(P0, num_blocks=4)
    story.tell(assign(request("old", 30, max_tokens=9), P0))
    story.tell(assign(request("young", 31, start=500, max_tokens=9), P0))
    story.step()
    for _ in range(4):
        story.step()
    assert story.worker.load().preemptions == 1
    while story.steps:
        story.step()
    ends = [o for t in story.heard(Tokens) for o in t.outputs if o.finish_reason]
    assert [o.request_id for o in ends] == ["old", "young"]
    story.assert_empty()


def test_penalties_see_the_whole_sequence() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=3, presence_penalty=1), P0))
    story.step(token_id=9)
    sample = story.steps[0].samples[0]
    assert sample.token_ids == [100, 101, 102, 103, 9]
    assert sample.prompt_tokens == 4


def test_load_is_said_when_idle_again() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 4, max_tokens=1), P0))
    story.heard(Load)
    story.step()
    (load,) = story.heard(Load)
    assert (load.waiting, load.running, load.free_blocks) == (0, 0, (16,))
    assert load.fragmentation == (0.0,)
    assert all(send.to == CONTROLLER for send in story.said)


def repeated(story: Story, rounds: int) -> Step:
    """Finish the step under way after so many rounds, each with the next token."""
    step = story.steps.pop(0)
    tokens = [Sampled(50 + i) for i in range(rounds) for _ in step.samples]
    story.tell(StepDone(step_id=step.step_id, sampled=tuple(tokens), started_ns=0, finished_ns=0))
    return step


def test_decode_steps_may_be_run_in_a_row_until_the_first_sequence_ends() -> None:
    story = Story(P0, max_repeats=10)
    story.tell(assign(request("r", 20, max_tokens=5, ignore_eos=True), P0))
    assert story.step().repeats == 1  # a prompt, and then a first token, is waited for
    story.tell(assign(request("s", 10, max_tokens=30, ignore_eos=True), P0))
    assert story.step().repeats == 4  # ended by the arrival of s
    assert story.step().repeats == 1
    story.heard(Tokens)
    assert repeated(story, 2).repeats == 2
    (tokens,) = story.heard(Tokens)
    assert [o.token_ids for o in tokens.outputs] == [(50, 51), (50, 51)]
    assert [o.finish_reason for o in tokens.outputs] == [FinishReason.LENGTH, None]
    step = repeated(story, 4)  # stopped early
    assert step.repeats == 10
    assert step.num_computed.tolist() == [12]
    assert story.steps[0].num_computed.tolist() == [16]
    assert story.steps[0].token_ids.tolist() == [53]


def test_steps_are_run_one_by_one_while_somebody_waits_or_may_end_any_time() -> None:
    story = Story(P0, max_repeats=10, max_num_seqs=1)
    story.tell(assign(request("r", 20, max_tokens=9, ignore_eos=True), P0))
    story.tell(assign(request("s", 20, max_tokens=9), P0))
    assert [story.step().repeats for _ in range(9)] == [1] * 9
    assert [story.step().repeats for _ in range(9)] == [1] * 9
    story.assert_empty()


def test_tables_of_a_step_are_copies() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 20, max_tokens=4), P0))
    before = story.steps[0].block_tables[0].copy()
    story.tell(assign(request("s", 20, start=400, max_tokens=4), P0))
    assert np.array_equal(story.steps[0].block_tables[0], before)


def test_a_hello_is_not_for_workers() -> None:
    story = Story(P0)
    assert story.tell(Hello(info=info_of(D0))) == []
