"""Every decision can be asked for: who was looked at, what was expected, what came of it."""

import random

import pytest

from penstock.control.explain import KEPT_MAX, Explanations
from penstock.core.messages import Submit, TokenOutput, Tokens
from penstock.core.request import Timeline
from penstock.core.types import NS_PER_MS, FinishReason, RequestId, WorkerId
from tests.control.story import Story, request

LONG = 3000


def make(*names: str, **settings: object) -> Story:
    return Story(*names, num_blocks=4096, policy="predicted", **settings)


def test_candidates_and_parts_are_told() -> None:
    story = make("p0", "p1", "d0", "d1")
    story.has_blocks("p1", 1600)
    story.submit("r", LONG)
    explained = story.controller.explain(RequestId("r"))
    assert explained is not None
    assert (explained.prefill_worker, explained.decode_worker) == ("p1", "d0")
    assert (explained.policy, explained.attempt, explained.is_alone) == ("predicted", 1, False)
    parts = explained.predicted
    total = parts.queue_ms + parts.prefill_ms + parts.transfer_ms + parts.first_decode_ms
    assert parts.ttft_ms == pytest.approx(total, abs=0.001)
    prefills = [c for c in explained.candidates if c.part == "prefill" and not c.closed]
    assert [(c.worker_id, c.cached_tokens) for c in prefills] == [("p1", 1600), ("p0", 0)]
    assert prefills[0].cost_ms < prefills[1].cost_ms
    assert {c.part for c in explained.candidates} == {"prefill", "decode", "alone"}
    assert explained.actual is None
    assert story.controller.explain(RequestId("nobody")) is None


def test_what_happened_stands_beside_what_was_expected() -> None:
    story = make("p0", "d0")
    story.submit("r", LONG)
    begin = story.now_ns
    story.offered("p0", "r")
    story.now_ns = begin + 80 * NS_PER_MS
    timeline = Timeline(
        arrived_ns=begin,
        prefill_started_ns=begin + 10 * NS_PER_MS,
        offered_ns=begin + 60 * NS_PER_MS,
        offer_received_ns=begin + 61 * NS_PER_MS,
        reserved_ns=begin + 62 * NS_PER_MS,
        pulled_ns=begin + 70 * NS_PER_MS,
        first_token_ns=begin + 79 * NS_PER_MS,
    )
    first = TokenOutput(RequestId("r"), (1,), timeline=timeline)
    story.tell(Tokens(worker_id=WorkerId("d0"), outputs=(first,)))
    story.now_ns = begin + 100 * NS_PER_MS - 1000
    last = TokenOutput(RequestId("r"), (2, 3), finish_reason=FinishReason.LENGTH)
    story.tell(Tokens(worker_id=WorkerId("d0"), outputs=(last,)))
    explained = story.controller.explain(RequestId("r"))
    assert explained is not None
    actual = explained.actual
    assert actual is not None
    assert explained.outcome == "finished"
    assert actual.queue_ms == pytest.approx(10)
    assert actual.prefill_ms == pytest.approx(50)
    assert actual.transfer_ms == pytest.approx(10)
    assert actual.first_decode_ms == pytest.approx(9)
    assert actual.ttft_ms == pytest.approx(80, abs=0.01)
    assert actual.tpot_ms == pytest.approx(10, abs=0.01)
    accuracy = story.controller.accuracy()
    assert (accuracy.ttft_count, accuracy.tpot_count) == (1, 1)
    assert accuracy.ttft_actual_s == pytest.approx(0.08, abs=1e-4)
    assert accuracy.ttft_predicted_s == pytest.approx(explained.predicted.ttft_ms / 1e3, abs=1e-4)
    assert 0 < accuracy.ttft_relative_error < 1


def test_a_further_attempt_is_told_as_such_and_not_counted_as_a_prediction() -> None:
    story = make("p0", "p1", "d0")
    story.submit("r", LONG)
    ((prefill, _),) = story.pairs()
    story.lose(prefill)
    story.tokens("d0", "r~1", 1, is_last=True)
    explained = story.controller.explain(RequestId("r"))
    assert explained is not None
    assert explained.attempt == 2
    assert explained.prefill_worker != prefill
    assert story.controller.accuracy().ttft_count == 0


def test_the_oldest_are_forgotten() -> None:
    story = Story("m0", num_blocks=4096)
    for number in range(KEPT_MAX + 5):
        story.controller.handle(Submit(request=request(f"r{number}")), story.now_ns)
        story.tokens("m0", f"r{number}", 1, is_last=True)
    assert story.controller.explain(RequestId("r4")) is None
    assert story.controller.explain(RequestId("r5")) is not None


def test_optimism_is_learnt_until_nine_in_ten_predictions_are_kept() -> None:
    explanations = Explanations()
    rng = random.Random(1)
    ratios = [rng.uniform(0.5, 2.0) for _ in range(4000)]
    for ratio in ratios:
        explanations._follow(ratio)
    assert explanations.optimism == pytest.approx(1.85, abs=0.15)
    for _ in range(4000):
        explanations._follow(rng.uniform(0.2, 0.9))
    assert explanations.optimism < 1.05
