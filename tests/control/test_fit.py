"""A fit finds coefficients, follows them, stays positive, and is no worse than its prior."""

import random
from math import log

import pytest

from penstock.control.fit import Fit
from penstock.control.profiles import coefficients_ns

TRUE = (4e6, 15e3, 0.4, 6e6, 8e3, 44.0)


def row(rng: random.Random) -> tuple[float, ...]:
    """What a step may have: a prefill, decodes, or both."""
    new = rng.choice((0, 0, rng.randint(2, 2048)))
    batch = rng.randint(0 if new else 1, 64)
    context = batch * rng.randint(10, 4000)
    quadratic = new * (new + 2 * rng.randint(0, 4000))
    return (float(new > 0 and not batch), new, quadratic, float(batch > 0), batch, context)


def duration(x: tuple[float, ...], coefficients: tuple[float, ...] = TRUE) -> float:
    return sum(map(float.__mul__, coefficients, map(float, x)))


@pytest.mark.parametrize("factor", [1.0, 0.001, 1000.0])
def test_it_finds_the_truth_from_a_prior_that_is_far_off(factor: float) -> None:
    rng = random.Random(3)
    fit = Fit([c * factor for c in TRUE])
    for _ in range(150):
        x = row(rng)
        fit.update(x, duration(x) * rng.uniform(0.95, 1.05))
    errors = []
    for _ in range(100):
        x = row(rng)
        errors.append(abs(fit.predict(x) / duration(x) - 1))
    assert sorted(errors)[90] < 0.1, sorted(errors)[90]
    assert (fit.coefficients >= 0).all()


def test_it_tells_a_mixture_of_hardware_apart_without_settings() -> None:
    rng = random.Random(4)
    slow = (4e6, 120e3, 2.0, 5e6, 80e3, 36.0)
    fits = {TRUE: Fit(coefficients_ns("")), slow: Fit(coefficients_ns(""))}
    for truth, fit in fits.items():
        for _ in range(200):
            x = row(rng)
            fit.update(x, duration(x, truth))
    long_prompt = (1.0, 2000.0, 4e6, 0.0, 0.0, 0.0)
    ratio = fits[slow].predict(long_prompt) / fits[TRUE].predict(long_prompt)
    expected = duration(long_prompt, slow) / duration(long_prompt)
    assert ratio == pytest.approx(expected, rel=0.1)


def test_it_follows_a_machine_that_slows_down() -> None:
    rng = random.Random(5)
    fit = Fit(TRUE)
    for speed in (1.0, 3.0):
        for _ in range(200):
            x = row(rng)
            fit.update(x, duration(x) * speed)
    x = row(rng)
    assert fit.predict(x) == pytest.approx(3 * duration(x), rel=0.15)


def test_one_stall_changes_little() -> None:
    rng = random.Random(6)
    fit = Fit(TRUE)
    for _ in range(100):
        x = row(rng)
        fit.update(x, duration(x) * rng.uniform(0.97, 1.03))
    x = row(rng)
    before = fit.predict(x)
    fit.update(x, duration(x) * 500)
    assert fit.predict(x) == pytest.approx(before, rel=0.4)
    for _ in range(20):
        y = row(rng)
        fit.update(y, duration(y))
    assert fit.predict(x) == pytest.approx(duration(x), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_on_garbage_it_is_no_worse_than_its_prior(seed: int) -> None:
    """Durations around the truth by chance alone, up to a factor of 100 either way."""
    rng = random.Random(seed)
    fit, total, prior_total = Fit(TRUE), 0.0, 0.0
    for _ in range(500):
        x = row(rng)
        observed = duration(x) * 10 ** rng.uniform(-2, 2)
        total += abs(log(fit.predict(x) / observed))
        prior_total += abs(log(duration(x) / observed))
        fit.update(x, observed)
    assert total < 1.05 * prior_total
    clean = [abs(fit.predict(x) / duration(x) - 1) for x in (row(rng) for _ in range(50))]
    assert sorted(clean)[25] < 1.0


@pytest.mark.parametrize(
    ("x", "observed"),
    [
        ((1.0, 2.0), 0.0),
        ((1.0, 2.0), -5.0),
        ((1.0, 2.0), float("nan")),
        ((1.0, 2.0), float("inf")),
        ((0.0, 0.0), 5.0),
        ((-1.0, 2.0), 5.0),
        ((float("nan"), 2.0), 5.0),
    ],
)
def test_what_can_be_no_sample_is_refused(x: tuple[float, ...], observed: float) -> None:
    fit = Fit((1.0, 1.0))
    assert not fit.update(x, observed)
    assert fit.num_samples == 0
    assert fit.predict((1.0, 1.0)) == 2.0


def test_its_errors_are_those_of_predictions_made_before() -> None:
    fit = Fit((100.0,))
    fit.update((1.0,), 200.0)
    assert fit.error == pytest.approx(fit.prior_error) == pytest.approx(0.693, rel=1e-3)
    for _ in range(50):
        fit.update((1.0,), 200.0)
    assert fit.is_trusted
    assert fit.error < 0.25 * fit.prior_error
