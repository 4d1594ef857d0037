"""The cost formulas against their text, and what feeds them."""

import numpy as np
import pytest

from penstock.control.cost import (
    OWN_AFTER,
    PAIRS_MAX,
    TransferCosts,
    WorkerCost,
    step_row,
)
from penstock.control.profiles import KERNEL_TIMES, coefficients_ns
from penstock.core.step import PullSample, StepSample
from penstock.core.types import WorkerId

H100 = "H100/llama3.1-8b/tp1"


def test_formulas_are_those_of_the_text() -> None:
    a, b, c, d, e, f = KERNEL_TIMES[H100][1]
    k = np.array(coefficients_ns(H100))
    prefill = StepSample(1000, 1000**2 + 2 * 1000 * 500, 0, 0, 0)
    expected_ms = a + b * 1000 + c * (1000**2 + 2 * 1000 * 500)
    assert k @ np.array(step_row(prefill)) / 1e6 == pytest.approx(expected_ms)
    decode = StepSample(0, 0, 32, 64_000, 0)
    assert k @ np.array(step_row(decode)) / 1e6 == pytest.approx(d + e * 32 + f * 64_000)


def test_a_mixed_step_reads_the_weights_once() -> None:
    assert step_row(StepSample(100, 10_000, 0, 0, 1)) == (1.0, 100, 10_000, 0.0, 0, 0)
    assert step_row(StepSample(0, 0, 3, 90, 1)) == (0.0, 0, 0, 1.0, 3, 90)
    assert step_row(StepSample(100, 10_000, 3, 90, 1)) == (0.0, 100, 10_000, 1.0, 3, 90)


def test_every_profile_is_whole() -> None:
    for profile, (capacity_tokens, coefficients) in KERNEL_TIMES.items():
        assert capacity_tokens > 50_000, profile
        assert len(coefficients) == 6, profile
        assert min(coefficients) >= 0, profile
    assert coefficients_ns("nobody knows") == coefficients_ns("")


def test_a_worker_without_a_profile_learns_from_its_steps() -> None:
    truth = np.array(coefficients_ns(H100))
    cost = WorkerCost()
    for new in range(64, 2048, 32):
        for batch in (0, 8, 40):
            sample = StepSample(new, new * new, batch, batch * 900, 0)
            took = int(truth @ np.array(step_row(sample)))
            learnt = cost.learn((StepSample(new, new * new, batch, batch * 900, took),))
    sample = StepSample(1000, 10**6, 0, 0, 0)
    row = np.array(step_row(sample))
    assert learnt @ row == pytest.approx(truth @ row, rel=0.15)


def test_a_pair_has_its_own_transfer_once_it_was_heard_of() -> None:
    costs = TransferCosts()
    fast, slow, to = WorkerId("fast"), WorkerId("slow"), WorkerId("d")
    for size in range(1, 60):
        num_bytes = size * 1_000_000
        costs.learn(to, (PullSample(fast, num_bytes, 1, 200_000 + num_bytes // 20),))
        costs.learn(to, (PullSample(slow, num_bytes, 1, 200_000 + num_bytes),))
    assert costs.predict_ns(fast, to, 30e6, 1) == pytest.approx(1.7e6, rel=0.2)
    assert costs.predict_ns(slow, to, 30e6, 1) == pytest.approx(30.2e6, rel=0.2)
    stranger = costs.predict_ns(WorkerId("new"), to, 30e6, 1)
    assert stranger == pytest.approx(costs._within.predict((1.0, 1.0, 30e6)))
    costs.forget(slow)
    assert costs.predict_ns(slow, to, 30e6, 1) == stranger


def test_pairs_are_bounded_and_few_samples_do_not_make_one() -> None:
    costs = TransferCosts()
    for number in range(PAIRS_MAX + 10):
        costs.learn(WorkerId("d"), (PullSample(WorkerId(str(number)), 10**6, 1, 10**6),))
    assert len(costs._pairs) == PAIRS_MAX
    assert OWN_AFTER > 1
    last = WorkerId(str(PAIRS_MAX + 9))
    assert not costs.known_to(WorkerId("d"))
    assert costs.predict_ns(last, WorkerId("d"), 1, 0) == costs.within[0] + costs.within[2]


def test_a_pair_of_which_nobody_has_heard_is_like_those_within_or_between_hosts() -> None:
    costs = TransferCosts()
    here, near, far, new = map(WorkerId, ("here", "near", "far", "new"))
    for name, host in ((here, "a"), (near, "a"), (new, "a"), (far, "b")):
        costs.join(name, host)
    sizes = [size * 1_000_000 for size in range(1, 60)]
    costs.learn(here, tuple(PullSample(far, size, 1, 200_000 + size) for size in sizes))
    between = costs.predict_ns(far, near, 30e6, 1)
    assert between == pytest.approx(30.2e6, rel=0.2)
    assert between / 3 < costs.predict_ns(new, near, 30e6, 1) < between  # nobody knows yet
    costs.learn(here, tuple(PullSample(near, size, 1, 200_000 + size // 20) for size in sizes))
    assert costs.predict_ns(new, near, 30e6, 1) == pytest.approx(1.7e6, rel=0.2)
    assert costs.predict_ns(far, near, 30e6, 1) == between
    assert costs.error < 0.2
