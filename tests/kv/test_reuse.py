"""The chance of another use: learnt from blocks that are young, old, used, and never used again."""

import random

import pytest

from penstock.kv.reuse import CHANCE_UNKNOWN, ReuseHistory


def test_without_experience_the_chance_is_one_half() -> None:
    history = ReuseHistory(1000)
    history.use("a")
    assert history.chance("a") == pytest.approx(CHANCE_UNKNOWN, abs=0.01)
    assert history.chance("never seen") == 0.0


def test_where_nothing_returns_the_chance_goes_to_nothing() -> None:
    history = ReuseHistory(1000)
    chances = []
    for number in range(4000):
        history.use(number)
        chances.append(history.chance(number))
    assert chances[500] < 0.2
    assert chances[-1] < 0.005
    assert len(history) <= 1000


def test_what_is_too_young_to_have_returned_does_not_count_against_it() -> None:
    """Sessions that return after 300 other blocks: until then, nothing is held against them."""
    history = ReuseHistory(1000)
    for number in range(300):
        history.use(number)
    assert history.chance(299) > 0.1
    for _ in range(5):
        for number in range(300):
            history.use(number)
    assert history.chance(299) > 0.95


def test_blocks_used_before_are_told_from_new_ones_and_age_counts() -> None:
    rng = random.Random(1)
    history = ReuseHistory(2000)
    for number in range(20_000):
        history.use(("once", number))
        if number % 4 == 0:
            history.use(("often", rng.randrange(50)))
    history.use(("once", -1))
    often = max(range(50), key=lambda n: history.chance(("often", n)))
    assert history.chance(("often", often)) > 0.9
    assert history.chance(("once", -1)) < 0.05


def test_when_the_load_changes_so_does_the_chance() -> None:
    history = ReuseHistory(256)
    for number in range(10_000):
        history.use(number)
    assert history.chance(9_999) < 0.01
    for turn in range(100):
        for number in range(100):
            history.use(("back", number))
        assert turn or history.chance(("back", 99)) < 0.01
    assert history.chance(("back", 99)) > 0.9


def test_a_block_that_is_met_is_used_once_if_it_is_new() -> None:
    history = ReuseHistory(100)
    history.meet("a")
    history.meet("a")
    assert len(history) == 1
    assert history.chance("a") == pytest.approx(CHANCE_UNKNOWN, abs=0.01)
