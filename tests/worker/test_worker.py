"""The worker core as stories: events in, expected commands out."""

import numpy as np
from msgspec.structs import replace

from penstock.core.events import EndStep, RunStep, StepDone
from penstock.core.messages import Cancel, Hello, Load, Tokens
from penstock.core.step import Sampled, Step
from penstock.core.types import CONTROLLER, FinishReason, RequestId
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


def heard_round(story: Story, *token_ids: int, is_last: bool = False) -> list[object]:
    """Tell of one round of the step under way; return what the worker does about it."""
    step = story.steps[0]
    done = StepDone(
        step_id=step.step_id,
        sampled=tuple(map(Sampled, token_ids)),
        started_ns=0,
        finished_ns=0,
        digests=((),),
        goes_on=not is_last,
    )
    if is_last:
        story.steps.pop(0)
    return [c for c in story.tell(done) if isinstance(c, EndStep | RunStep)]


def test_rounds_are_taken_in_one_by_one_and_a_newcomer_ends_them() -> None:
    story = Story(P0, max_rounds=8)
    story.tell(assign(request("r", 20, max_tokens=30), P0))
    story.step()
    step = story.steps[0]
    assert (step.repeats, step.num_computed.tolist()) == (8, [20])
    story.heard(Tokens)
    assert heard_round(story, 50) == []
    assert heard_round(story, 51) == []
    assert [m.outputs[0].token_ids for m in story.heard(Tokens)] == [(50,), (51,)]
    # Somebody comes: told once; the round that is under way is taken in as any other.
    ending = story.tell(assign(request("s", 10, max_tokens=30), P0))
    assert [c for c in ending if isinstance(c, EndStep)] == [EndStep(step.step_id)]
    (started,) = heard_round(story, 52, is_last=True)
    assert started.step.num_computed.tolist() == [23, 0]
    assert started.step.token_ids.tolist()[0] == 52
    assert started.step.repeats == 1


def test_what_ends_in_a_round_is_freed_after_the_one_that_is_under_way() -> None:
    story = Story(P0, max_rounds=8)
    story.tell(assign(request("r", 20, max_tokens=30), P0))
    story.tell(assign(request("s", 10, start=400, max_tokens=30), P0))
    story.step()
    story.step()
    step = story.steps[0]
    assert (step.repeats, len(step.samples)) == (8, 2)
    story.heard(Tokens)
    # 7 ends a text. Its row is computed once more, for nobody.
    assert heard_round(story, 7, 60) == [EndStep(step.step_id)]
    assert RequestId("r") in story.worker.sequences
    assert heard_round(story, 99, 61, is_last=True)[0].step.num_computed.tolist() == [12]
    assert RequestId("r") not in story.worker.sequences
    first, second = story.heard(Tokens)
    assert [o.finish_reason for o in first.outputs] == [FinishReason.STOP, None]
    assert [o.token_ids for o in second.outputs] == [(61,)]


def test_a_cancel_ends_rounds_and_frees_after_them() -> None:
    story = Story(P0, max_rounds=8)
    story.tell(assign(request("r", 20, max_tokens=30), P0))
    story.step()
    commands = story.tell(Cancel(request_id=RequestId("r")))
    assert EndStep(story.steps[0].step_id) in commands
    # Another round was under way behind this one already: it still writes its blocks.
    assert heard_round(story, 50) == []
    assert RequestId("r") in story.worker.sequences
    heard_round(story, 51, is_last=True)
    story.assert_empty()


def test_rounds_stop_at_the_most_tokens_that_a_request_may_have() -> None:
    story = Story(P0, max_rounds=8)
    story.tell(assign(request("r", 20, max_tokens=4), P0))
    story.step()
    assert story.steps[0].repeats == 3


def test_a_window_moves_with_every_step_so_that_there_are_no_rounds() -> None:
    story = Story(P0, max_rounds=8)
    asked = replace(request("r", 60, max_tokens=30), kv_window=8)
    story.tell(assign(asked, P0))
    story.step()
    # From here on blocks between the first one and the window are let go, and may be anybody's.
    assert [story.step().repeats for _ in range(12)] == [1] * 12
    assert story.steps[0].gaps is not None


def test_tables_of_a_step_are_copies() -> None:
    story = Story(P0)
    story.tell(assign(request("r", 20, max_tokens=4), P0))
    before = story.steps[0].block_tables[0].copy()
    story.tell(assign(request("s", 20, start=400, max_tokens=4), P0))
    assert np.array_equal(story.steps[0].block_tables[0], before)


def test_a_hello_is_not_for_workers() -> None:
    story = Story(P0)
    assert story.tell(Hello(info=info_of(D0))) == []
